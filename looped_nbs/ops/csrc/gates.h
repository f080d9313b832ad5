// Exponential, tanh, logistic function and softmax of registers on the CPU.
#pragma once
#include "lanes.h"

template <class T> struct Whole { typedef int32_t Type; };
template <> struct Whole<double> { typedef int64_t Type; };

template <class T> constexpr T inverse_factorial(int n) { return n > 1 ? inverse_factorial<T>(n - 1) / n : T(1); }

// e^x = scale (1 + rest) with x = n ln 2 + r, scale = 2^n, and rest = e^r - 1 as a Taylor polynomial.
template <class T, int W> struct Power { V<T, W> scale, rest; };

template <class T, int W> NBS_SHARED Power<T, W> power(V<T, W> x) {
  typedef V<typename Whole<T>::Type, W> I;
  constexpr bool single = sizeof(T) == 4;
  constexpr T limit = single ? T(87) : T(708);
  x = x < -limit ? V<T, W>{} - limit : x > limit ? V<T, W>{} + limit : x;
  const I n = __builtin_convertvector(x * T(1.4426950408889634074) + T(2048.5), I) - 2048;
  const V<T, W> whole = __builtin_convertvector(n, V<T, W>);
  V<T, W> r = x - whole * (single ? T(0.693359375) : T(6.93147180369123816490e-01));
  r = r - whole * (single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10));
  V<T, W> p = {};
#pragma GCC unroll 16
  for (int i = single ? 8 : 14; i > 0; i--) p = p * r + inverse_factorial<T>(i);
  const I bits = (n + (single ? 127 : 1023)) << (single ? 23 : 52);
  V<T, W> scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return {scale, p * r};
}

template <class T, int W> NBS_SHARED V<T, W> exponential(const V<T, W>& x) {
  const Power<T, W> e = power<T, W>(x);
  return e.scale * e.rest + e.scale;
}

template <class T, int W> NBS_SHARED V<T, W> hyperbolic(const V<T, W>& x) {
  const Power<T, W> e = power<T, W>(x + x);
  const V<T, W> less = e.scale * e.rest + (e.scale - T(1));  // e^2x - 1, exact near zero too
  return less / (less + T(2));
}

template <class T, int W> NBS_SHARED V<T, W> logistic(const V<T, W>& x) {
  return T(1) / (T(1) + exponential<T, W>(-x));
}

template <class T, int W> NBS_SHARED T dot(const T* a, const T* b, int n) {
  return sum<T, W>(products<T, W>(a, b, n));
}

template <class T, int W, int Half = W / 2> NBS_SHARED T highest(const V<T, W>& x) {
  if constexpr (Half == 0) {
    return x[0];
  } else {
    const V<T, W> other = Fold<T, W>::template exchange<Half>(x, std::make_index_sequence<W>());
    return highest<T, W, Half / 2>(x > other ? x : other);
  }
}

// Softmax of the first n of `padded` numbers; the rest becomes zero.
template <class T, int W> NBS_SHARED void softmax(T* z, int padded, int n) {
  for (int i = n; i < padded; i++) z[i] = -INFINITY;
  V<T, W> high = load<T, W>(z), total = {};
  for (int i = W; i < padded; i += W) {
    const V<T, W> x = load<T, W>(z + i);
    high = x > high ? x : high;
  }
  const T top = highest<T, W>(high);
  for (int i = 0; i < padded; i += W) store<T, W>(z + i, exponential<T, W>(load<T, W>(z + i) - top));
  for (int i = n; i < padded; i++) z[i] = 0;
  for (int i = 0; i < padded; i += W) total += load<T, W>(z + i);
  const T scale = T(1) / sum<T, W>(total);
  for (int i = 0; i < padded; i += W) store<T, W>(z + i, load<T, W>(z + i) * scale);
}

// From the gradient of probabilities p to that of what the softmax was taken of, in place.
template <class T, int W> NBS_SHARED void softmax_backward(T* grad, const T* p, int padded) {
  const T mean = dot<T, W>(p, grad, padded);
  for (int i = 0; i < padded; i += W)
    store<T, W>(grad + i, load<T, W>(p + i) * (load<T, W>(grad + i) - mean));
}

template <class T> NBS_SHARED T logistic_number(T x) { return T(1) / (T(1) + std::exp(-x)); }
