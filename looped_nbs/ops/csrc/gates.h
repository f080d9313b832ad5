// Exponential, tanh, logistic function and softmax of registers on the CPU.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// 2^x = 2^n 2^r with |r| <= 1/2: the polynomial of least relative error for float, the Taylor polynomial for double.
template <class T> constexpr T kPowers[] = {0.6931472028550896, 0.24022647912606798, 0.0555033246991928,
                                            0.009618437459715416, 0.0013398875012183764, 0.00015353337705129217};
template <> constexpr double kPowers<double>[] = {
    6.931471805599453e-01, 2.402265069591007e-01, 5.550410866482158e-02, 9.618129107628477e-03, 1.333355814642844e-03,
    1.540353039338161e-04, 1.525273380405984e-05, 1.321548679014431e-06, 1.017808600923970e-07, 7.054911620801123e-09,
    4.445538271870812e-10, 2.567843599348821e-11, 1.369148885390413e-12};

template <class T, int W> NBS_SHARED V<T, W> two_to(V<T, W> x) {
  typedef V<typename Whole<T>::Type, W> I;
  V<T, W> whole;
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64 && sizeof(T) == 4) whole = (V<T, W>)_mm512_maskz_roundscale_ps(0xffff, (__m512)x, 8);
  else if constexpr (sizeof(x) == 64) whole = (V<T, W>)_mm512_maskz_roundscale_pd(0xff, (__m512d)x, 8);
  else
#endif
  {
    constexpr T limit = sizeof(T) == 4 ? T(126) : T(1022);
    x = x < -limit ? V<T, W>{} - limit : x > limit ? V<T, W>{} + limit : x;
    whole = __builtin_convertvector(__builtin_convertvector(x + T(2048.5), I) - 2048, V<T, W>);
  }
  const V<T, W> r = x - whole;
  V<T, W> p = {};
#pragma GCC unroll 16
  for (int i = sizeof(kPowers<T>) / sizeof(T) - 1; i >= 0; i--) p = (p + kPowers<T>[i]) * r;
  p += T(1);
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64 && sizeof(T) == 4) return (V<T, W>)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)whole);
  else if constexpr (sizeof(x) == 64) return (V<T, W>)_mm512_maskz_scalef_pd(0xff, (__m512d)p, (__m512d)whole);
#endif
  const I bits = (__builtin_convertvector(whole, I) + (sizeof(T) == 4 ? 127 : 1023)) << (sizeof(T) == 4 ? 23 : 52);
  V<T, W> scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return scale * p;
}

template <class T> constexpr T kOdd[] = {  // 2 / (2 i + 1)
    2, 2 / T(3), 2 / T(5), 2 / T(7), 2 / T(9), 2 / T(11), 2 / T(13), 2 / T(15), 2 / T(17), 2 / T(19), 2 / T(21), 2 / T(23),
    2 / T(25), 2 / T(27), 2 / T(29), 2 / T(31), 2 / T(33), 2 / T(35)};
constexpr double kLog2E = 1.4426950408889634074;

// log(1 + e^x) and its derivative: log(1 + u) as a series in u / (2 + u), with u = e^-|x| at most 1.
template <class T, int W> NBS_SHARED V<T, W> softplus(const V<T, W>& x, V<T, W>& slope) {
  const V<T, W> u = two_to<T, W>((x > 0 ? -x : x) * T(kLog2E));
  const V<T, W> w = u / (T(2) + u), square = w * w;
  V<T, W> series = {};
#pragma GCC unroll 20
  for (int i = sizeof(T) == 4 ? 7 : 17; i >= 0; i--) series = series * square + kOdd<T>[i];
  slope = (x > 0 ? V<T, W>{} + T(1) : u) / (T(1) + u);
  return (x > 0 ? x : V<T, W>{}) + series * w;
}

template <class T, int W> NBS_SHARED V<T, W> hyperbolic(const V<T, W>& x) {
  const Power<T, W> e = power<T, W>(x + x);
  const V<T, W> less = e.scale * e.rest + (e.scale - T(1));  // e^2x - 1, exact near zero too
  return less / (less + T(2));
}

template <class T, int W> NBS_SHARED V<T, W> logistic(const V<T, W>& x) {
  return T(1) / (T(1) + two_to<T, W>(x * T(-kLog2E)));
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
