// Sweeps over matrices whose rows are padded to whole registers: columns in tiles that fit in the registers.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdlib>

#include "gates.h"
#include "lanes.h"

template <int n> struct Size { static constexpr int value = n; };

constexpr int kTile = NBS_REGISTERS / 4;

// Call f(Size<n>, first) for tiles of n registers that cover `count` registers.
template <int n = kTile, class F> NBS_SHARED void tiles(int count, const F& f, int first = 0) {
  for (; count >= n; count -= n, first += n) f(Size<n>{}, first);
  if constexpr (n > 1)
    if (count) tiles<n - 1>(count, f, first);
}

template <class T, int W, int n> NBS_SHARED void load_tile(V<T, W>* x, const T* from) {
  for (int i = 0; i < n; i++) x[i] = load<T, W>(from + i * W);
}
template <class T, int W, int n> NBS_SHARED void store_tile(T* to, const V<T, W>* x) {
  for (int i = 0; i < n; i++) store<T, W>(to + i * W, x[i]);
}

// y += u M; several rows at once where a tile is narrow, so that additions do not wait for each other.
template <class T, int W> inline void add_vecmat(T* y, const T* u, const T* M, int rows, int width) {
  tiles(width / W, [=](auto size, int first) {
    constexpr int n = decltype(size)::value, most = NBS_REGISTERS / 2 / n, ways = most < 1 ? 1 : most < 4 ? most : 4;
    const T* row = M + first * W;
    V<T, W> total[ways][n] = {};
    int e = 0;
    for (; e + ways <= rows; e += ways)
      for (int w = 0; w < ways; w++, row += width)
        for (int i = 0; i < n; i++) total[w][i] += u[e + w] * load<T, W>(row + i * W);
    for (; e < rows; e++, row += width)
      for (int i = 0; i < n; i++) total[0][i] += u[e] * load<T, W>(row + i * W);
    for (int i = 0; i < n; i++) {
      for (int w = 1; w < ways; w++) total[0][i] += total[w][i];
      total[0][i] += load<T, W>(y + (first + i) * W);
    }
    store_tile<T, W, n>(y + first * W, total[0]);
  });
}

// Sums over a tile of the columns of all rows, a multiple of W: f(row, x) sets x[0], ..., x[N - 1], which go to, or are
// added to, to[0], ..., to[N - 1].
template <class T, int W, int N, class F> NBS_SHARED void sum_rows(T* const* to, bool add, int rows, const F& f) {
  for (int group = 0; group < rows; group += W) {
    V<T, W> x[N];
    Fold<T, W>::template rows<N>(f, group, x);
    for (int i = 0; i < N; i++) store<T, W>(to[i] + group, add ? load<T, W>(to[i] + group) + x[i] : x[i]);
  }
}

// y = M u, for a multiple of W rows
template <class T, int W> inline void matvec(T* y, const T* M, const T* u, int rows, int width) {
  tiles(width / W, [=](auto size, int first) {
    constexpr int n = decltype(size)::value;
    V<T, W> x[n];
    load_tile<T, W, n>(x, u + first * W);
    sum_rows<T, W, 1>(&y, first > 0, rows, [&](int e, V<T, W>* total) __attribute__((always_inline)) {
      total[0] = V<T, W>{};
      for (int i = 0; i < n; i++) total[0] += x[i] * load<T, W>(M + e * width + (first + i) * W);
    });
  });
}

// M += the sum over steps of column vectors u times row vectors v
template <class T, int W>
inline void add_outers(T* M, const T* u, int u_width, const T* v, int steps, int rows, int width) {
  tiles(width / W, [=](auto size, int first) {
    constexpr int n = decltype(size)::value;
    for (int e = 0; e < rows; e++) {
      T* row = M + e * width + first * W;
      V<T, W> x[n];
      load_tile<T, W, n>(x, row);
      for (int s = 0; s < steps; s++)
        for (int i = 0; i < n; i++) x[i] += u[s * u_width + e] * load<T, W>(v + s * width + (first + i) * W);
      store_tile<T, W, n>(row, x);
    }
  });
}

// A matrix to and from padded rows; `stride` holds those of its rows and columns. An absent one counts as zeros.
template <class T> inline void read_matrix(T* M, int width, int padded, const T* from, const int64_t* stride,
                                           int rows, int columns) {
  for (int e = 0; e < rows; e++)
    read(M + e * width, padded, from ? from + e * stride[0] : from, stride[1], columns);
}
template <class T> inline void write_matrix(T* to, const int64_t* stride, const T* M, int width, int rows,
                                            int columns) {
  for (int e = 0; e < rows && to; e++) write(to + e * stride[0], stride[1], M + e * width, columns);
}

// Call f.template run<T, W>() with registers that suit n columns.
template <class T, class F> int with_lanes(int n, const F& f) {
  constexpr int widest = NBS_REGISTER_BYTES / sizeof(T), narrow = widest > 4 ? widest / 2 : widest;
  return n <= narrow ? f.template run<T, narrow>() : f.template run<T, widest>();
}

// What a pass over whole heads is called with; a pass derives from it and has `run<T, W>()`.
struct HeadCall {
  const Tensor* t;
  int batch, time, heads, dim, threads;

  template <class T, class Pass> static int start(Pass pass, const Tensor* t, const int64_t* n, int64_t threads) {
    static_cast<HeadCall&>(pass) = {t, int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(threads)};
    return with_lanes<T>(pass.dim, pass);
  }
};

// Call f(batch, head, memory) for every head, each thread with memory of its own for so many numbers; the largest
// status that comes back.
constexpr int kNoMemory = -2;  // as CUDA counts

template <class T, class F> int each_head(int batch, int heads, int threads, size_t numbers, const F& f) {
  const size_t each = (numbers * sizeof(T) + 255) / 128 * 128;
  char* memory = static_cast<char*>(std::malloc(each * threads + 64));
  if (!memory) return kNoMemory;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
  const int64_t items = int64_t(batch) * heads;
  int status = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : status) if (threads > 1)
  for (int64_t item = 0; item < items; item++) {
#ifdef _OPENMP
    const size_t thread = omp_get_thread_num();
#else
    const size_t thread = 0;
#endif
    const int said = f(item / heads, item % heads, reinterpret_cast<T*>(start + each * thread));
    status = said > status ? said : status;
  }
  std::free(memory);
  return status;
}

// Hand out consecutive pieces of a thread's memory, all zero.
template <class T> struct Pieces {
  T* next;
  T* operator()(int64_t n) {
    T* piece = next;
    std::memset(piece, 0, n * sizeof(T));
    next += n;
    return piece;
  }
};
