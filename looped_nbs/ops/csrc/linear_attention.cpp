// Causal linear attention on the CPU. Heads are independent; a slab of columns of the state stays in the nearest cache
// and is swept once for each block of steps.
#include "lanes.h"
#include "linear_attention.h"

namespace {

constexpr int kMaxDim = 256, kAhead = 12;

// Tensors: q k v state | y final
struct Forward : SlabCall {
  template <class T, int W, int N> int run() const {
    const int64_t items = int64_t(batch) * heads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t item = 0; item < items; item++)
      for (int column = 0; column < d_v; column += W * N) slab<T, W, N>(item / heads, item % heads, column);
    return 0;
  }

  // A block of steps in one sweep over the rows. Sums are local: what is only counted up stays in registers.
  template <class T, int W, int N, int Steps> NBS_SHARED void sweep(
      T* state, const T (*k)[kMaxDim], const T (*q)[kMaxDim], const V<T, W> (&v)[Steps][N],
      V<T, W> (&all_y)[Steps][N]) const {
    V<T, W> y[Steps][N] = {};
    for (int e = 0; e < d_k; e++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        V<T, W> row = load<T, W>(state + (e * N + n) * W);
#pragma GCC unroll 4
        for (int s = 0; s < Steps; s++) linear_forward_row(row, k[s][e], v[s][n], q[s][e], y[s][n]);
        store<T, W>(state + (e * N + n) * W, row);
      }
#pragma GCC unroll 4
    for (int s = 0; s < Steps; s++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) all_y[s][n] = y[s][n];
  }

  template <class T, int W, int N> void slab(int64_t b, int64_t h, int first) const {
    constexpr int Steps = NBS_REGISTERS >= 32 ? 4 : 2, Columns = W * N;
    const int columns = d_v - first < Columns ? d_v - first : Columns;
    alignas(64) T state[kMaxDim * Columns], q[Steps][kMaxDim], k[Steps][kMaxDim], buffer[Columns];
    for (int e = 0; e < d_k; e++) {
      const T* from = t[3].at<T>(b, h, e);
      read(state + e * Columns, Columns, from ? from + first * t[3].stride[3] : from, t[3].stride[3], columns);
    }
    for (int step = 0; step < time; step += Steps) {
      V<T, W> v[Steps][N], y[Steps][N];
      for (int s = 0; s < Steps; s++) {
        const bool real = step + s < time;
        if (step + s + kAhead < time) {
          for (int i = 0; i < 2; i++) ahead(t[i].at<T>(b, step + s + kAhead, h), d_k);
          ahead(t[2].at<T>(b, step + s + kAhead, h) + first, columns);
          ahead<true>(t[4].at<T>(b, step + s + kAhead, h) + first, columns);
        }
        read(q[s], d_k, real ? t[0].at<T>(b, step + s, h) : nullptr, t[0].stride[3], d_k);
        read(k[s], d_k, real ? t[1].at<T>(b, step + s, h) : nullptr, t[1].stride[3], d_k);
        const T* from = real ? t[2].at<T>(b, step + s, h) + first * t[2].stride[3] : nullptr;
        read(buffer, Columns, from, t[2].stride[3], columns);
        for (int n = 0; n < N; n++) v[s][n] = load<T, W>(buffer + n * W);
      }
      sweep<T, W, N, Steps>(state, k, q, v, y);
      for (int s = 0; s < Steps && step + s < time; s++) {
        for (int n = 0; n < N; n++) store<T, W>(buffer + n * W, y[s][n]);
        write(t[4].at<T>(b, step + s, h) + first * t[4].stride[3], t[4].stride[3], buffer, columns);
      }
    }
    for (int e = 0; e < d_k; e++)
      write(t[5].at<T>(b, h, e) + first * t[5].stride[3], t[5].stride[3], state + e * Columns, columns);
  }
};

// Tensors: q k v state final | dy dfinal | dq dk dv dstate
struct Backward : SlabCall {
  template <class T, int W, int N> int run() const {
    const int64_t items = int64_t(batch) * heads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t item = 0; item < items; item++)
      for (int column = 0; column < d_v; column += W * N) slab<T, W, N>(item / heads, item % heads, column);
    return 0;
  }

  template <class T, int W, int N> void slab(int64_t b, int64_t h, int first) const {
    constexpr int Columns = W * N;
    const int columns = d_v - first < Columns ? d_v - first : Columns, rows = round_up(d_k, W);
    alignas(64) T state[kMaxDim * Columns], grad[kMaxDim * Columns], buffer[Columns];
    alignas(64) T q[kMaxDim], k[kMaxDim], dq[kMaxDim], dk[kMaxDim];
    const auto part = [&](int i, T* row) { return row ? row + first * t[i].stride[3] : row; };
    for (int e = 0; e < rows; e++) {
      const bool real = e < d_k;
      const auto from = [&](int i) { return real ? part(i, t[i].at<T>(b, h, e)) : nullptr; };
      read(state + e * Columns, Columns, from(4), t[4].stride[3], columns);
      read(grad + e * Columns, Columns, from(6), t[6].stride[3], columns);
    }
    for (int step = time - 1; step >= 0; step--) {
      if (step >= kAhead) {
        for (int i : {0, 1}) ahead(t[i].at<T>(b, step - kAhead, h), d_k);
        for (int i : {7, 8}) ahead<true>(t[i].at<T>(b, step - kAhead, h), d_k);
        for (int i : {2, 5}) ahead(part(i, t[i].at<T>(b, step - kAhead, h)), columns);
        ahead<true>(part(9, t[9].at<T>(b, step - kAhead, h)), columns);
      }
      V<T, W> v[N], dy[N], dv[N] = {};
      read(q, rows, t[0].at<T>(b, step, h), t[0].stride[3], d_k);
      read(k, rows, t[1].at<T>(b, step, h), t[1].stride[3], d_k);
      read(buffer, Columns, part(2, t[2].at<T>(b, step, h)), t[2].stride[3], columns);
      for (int n = 0; n < N; n++) v[n] = load<T, W>(buffer + n * W);
      read(buffer, Columns, part(5, t[5].at<T>(b, step, h)), t[5].stride[3], columns);
      for (int n = 0; n < N; n++) dy[n] = load<T, W>(buffer + n * W);
      for (int group = 0; group < rows; group += W) {
        const auto row = [&](int e, V<T, W>* sums) __attribute__((always_inline)) {
          sums[0] = sums[1] = V<T, W>{};
          for (int n = 0; n < N; n++) {
            T *at_state = state + e * Columns + n * W, *at_grad = grad + e * Columns + n * W;
            V<T, W> S = load<T, W>(at_state), G = load<T, W>(at_grad);
            linear_backward_row(S, G, k[e], v[n], q[e], dy[n], sums[0], sums[1], dv[n]);
            store<T, W>(at_state, S);
            store<T, W>(at_grad, G);
          }
        };
        V<T, W> sums[2];
        Fold<T, W>::template rows<2>(row, group, sums);
        store<T, W>(dq + group, sums[0]);
        store<T, W>(dk + group, sums[1]);
      }
      write(t[7].at<T>(b, step, h), t[7].stride[3], dq, d_k, first > 0);
      write(t[8].at<T>(b, step, h), t[8].stride[3], dk, d_k, first > 0);
      for (int n = 0; n < N; n++) store<T, W>(buffer + n * W, dv[n]);
      write(part(9, t[9].at<T>(b, step, h)), t[9].stride[3], buffer, columns);
    }
    for (int e = 0; e < d_k; e++)
      write(part(10, t[10].at<T>(b, h, e)), t[10].stride[3], grad + e * Columns, columns);
  }
};

}  // namespace

NBS_KERNELS(linear_attention)
