// Registers of W numbers for the CPU kernels, written with the vector extension of GCC and clang.
#pragma once
#include <cmath>
#include <cstring>
#include <utility>

#include "tensors.h"

#if defined(__AVX512F__)
#define NBS_REGISTER_BYTES 64
#define NBS_REGISTERS 32
#elif defined(__AVX__)
#define NBS_REGISTER_BYTES 32
#define NBS_REGISTERS 16
#else
#define NBS_REGISTER_BYTES 16
#define NBS_REGISTERS 16
#endif

template <class T, int W> struct Lanes { typedef T Type __attribute__((vector_size(W * sizeof(T)))); };
template <class T, int W> using V = typename Lanes<T, W>::Type;

template <class T, int W> NBS_SHARED V<T, W> load(const T* from) {
  V<T, W> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <class T, int W> NBS_SHARED void store(T* to, const V<T, W>& x) { std::memcpy(to, &x, sizeof(x)); }

// Row r is f(r); lane r of the result is the sum over the lanes of row r. W rows, 2 (W - 1) shuffles.
template <class T, int W> struct Fold {
  static constexpr int group = 16 / sizeof(T);  // lanes in 128 bits: shuffles within them are cheap

  // Source lane, in the concatenation of two vectors, of lane i; `high` picks the second half to be added.
  static constexpr int pick(int rows, int i, bool high) {
    const int in = i % group, g = i / group;
    if (rows == 2) return g * group + in / 2 + (high ? group / 2 : 0) + (in % 2) * W;
    if (rows <= group) return g * group + in % 2 + (high ? 2 : 0) + (in / 2) * W;
    const int half = W / group / 2;
    return (g % half * 2 + high) * group + in + (g / half) * W;
  }

#if defined(__clang__) || __GNUC__ >= 12
#define NBS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
  typedef V<typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type, W> Places;
#define NBS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

  template <int Rows, bool High, size_t... I>
  static NBS_SHARED V<T, W> shuffle(const V<T, W>& a, const V<T, W>& b, std::index_sequence<I...>) {
    return NBS_SHUFFLE(a, b, pick(Rows, I, High)...);
  }

  template <int Half, size_t... I> static NBS_SHARED V<T, W> exchange(const V<T, W>& a, std::index_sequence<I...>) {
    return NBS_SHUFFLE(a, a, int(I ^ Half)...);
  }

  template <int Rows> static NBS_SHARED V<T, W> merge(const V<T, W>& a, const V<T, W>& b) {
    const auto lanes = std::make_index_sequence<W>();
    return shuffle<Rows, false>(a, b, lanes) + shuffle<Rows, true>(a, b, lanes);
  }

  // N sums at once: f(r, x) sets x[0], ..., x[N - 1].
  template <int N, int Rows = W, class F> static NBS_SHARED void rows(const F& f, int first, V<T, W>* out) {
    if constexpr (Rows == 1) {
      f(first, out);
    } else {
      V<T, W> a[N], b[N];
      rows<N, Rows / 2>(f, first, a);
      rows<N, Rows / 2>(f, first + Rows / 2, b);
      for (int n = 0; n < N; n++) out[n] = merge<Rows>(a[n], b[n]);
    }
  }
};

// Exchange halves, then quarters, and so on, until every lane holds the sum.
template <class T, int W, int Half = W / 2> NBS_SHARED T sum(const V<T, W>& x) {
  if constexpr (Half == 0) return x[0];
  else return sum<T, W, Half / 2>(x + Fold<T, W>::template exchange<Half>(x, std::make_index_sequence<W>()));
}

template <class T, int W> NBS_SHARED V<T, W> products(const T* a, const T* b, int n) {  // n is a multiple of W
  V<T, W> total = {};
  for (int i = 0; i < n; i += W) total += load<T, W>(a + i) * load<T, W>(b + i);
  return total;
}

template <class T> NBS_SHARED void copy(T* to, const T* from, int n) {
  constexpr int W = NBS_REGISTER_BYTES / sizeof(T), Few = 16 / sizeof(T);
  int i = 0;
  for (; i + W <= n; i += W) store<T, W>(to + i, load<T, W>(from + i));
  for (; i + Few <= n; i += Few) store<T, Few>(to + i, load<T, Few>(from + i));
  for (; i < n; i++) to[i] = from[i];
}

// Copy n numbers to the front of `padded` and fill it up with zeros; an absent tensor counts as zeros.
template <class T> NBS_SHARED void read(T* to, int padded, const T* from, int64_t stride, int n) {
  if (!from) n = 0;
  if (stride == 1) copy(to, from, n);
  else for (int i = 0; i < n; i++) to[i] = from[i * stride];
  for (int i = n; i < padded; i++) to[i] = 0;
}

template <class T> NBS_SHARED void write(T* to, int64_t stride, const T* from, int n, bool add = false) {
  if (!to) return;
  if (add) for (int i = 0; i < n; i++) to[i * stride] += from[i];
  else if (stride == 1) copy(to, from, n);
  else for (int i = 0; i < n; i++) to[i * stride] = from[i];
}

// A register of n numbers that lie in a tensor; the rest is zero, and so is all of an absent one.
template <class T, int W> NBS_SHARED V<T, W> get(const T* from, int64_t stride, int n) {
  if (from && stride == 1 && n == W) return load<T, W>(from);
  T buffer[W] = {};
  for (int i = 0; i < W && from; i++)
    if (i < n) buffer[i] = from[i * stride];
  return load<T, W>(buffer);
}
template <class T, int W> NBS_SHARED void put(T* to, int64_t stride, const V<T, W>& x, int n) {
  if (to && stride == 1 && n == W) return store<T, W>(to, x);
  for (int i = 0; i < W && to; i++)
    if (i < n) to[i * stride] = x[i];
}
template <class T> NBS_SHARED T* moved(T* p, int64_t by) { return p ? p + by : p; }

// Ask for n numbers that will be read or written soon: rows of one head lie apart, too far for the processor to guess. They
// go to the second cache: rows of many tensors, whose addresses differ by a power of two, push each other out of the first.
template <bool Write = false, class T> NBS_SHARED void ahead(const T* row, int n) {
  if (!row) return;
  for (int i = 0; i < n; i += 64 / int(sizeof(T))) __builtin_prefetch(row + i, Write, 2);
}

constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Call f.template run<T, W, N>() with the narrowest slab of N registers of W lanes that suits n columns.
template <class T, class F> int with_slab(int n, const F& f) {
  constexpr int widest = NBS_REGISTER_BYTES / sizeof(T), narrow = widest > 4 ? widest / 2 : widest;
  if (n <= narrow) return f.template run<T, narrow, 1>();
  if (n <= widest) return f.template run<T, widest, 1>();
  return f.template run<T, widest, 2>();
}

// What a pass over slabs of columns is called with; a pass derives from it and has `run<T, W, N>()`.
struct SlabCall {
  const Tensor* t;
  int batch, time, heads, d_k, d_v, threads;

  template <class T, class Pass> static int start(Pass pass, const Tensor* t, const int64_t* n, int64_t threads) {
    static_cast<SlabCall&>(pass) = {t, int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(n[4]), int(threads)};
    return with_slab<T>(pass.d_v, pass);
  }
};

// The functions that Python finds: both passes, in both types.
#define NBS_KERNEL(name, pass, type) \
  NBS_EXPORT int name(const Tensor* t, const int64_t* sizes, int64_t threads) { \
    return pass::start<type>(pass(), t, sizes, threads); \
  }
#define NBS_KERNELS(name) \
  NBS_KERNEL(name##_forward_float32, Forward, float) \
  NBS_KERNEL(name##_forward_float64, Forward, double) \
  NBS_KERNEL(name##_backward_float32, Backward, float) \
  NBS_KERNEL(name##_backward_float64, Backward, double)
