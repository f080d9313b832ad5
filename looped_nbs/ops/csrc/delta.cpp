// The delta rule on the CPU. Heads are independent; a slab of columns of the state stays in the nearest cache. Forwards
// it is swept once for each block of steps: what a block writes is added during the sweep of the next one, and what steps
// of one block mean for each other goes through products of their keys and queries.
#include "delta.h"
#include "lanes.h"

namespace {

constexpr int kMaxDim = 256, kAhead = 12;

struct Call : SlabCall {
  template <class T> static T* part(const Tensor& x, T* row, int first) {
    return row ? row + first * x.stride[3] : row;
  }

  template <class T> NBS_SHARED void read_columns(int i, T* row, int first, T* to, int padded, int columns) const {
    read(to, padded, part(t[i], row, first), t[i].stride[3], columns);
  }
};

// Tensors: q k v beta state | y final error
struct Forward : Call {
  template <class T, int W, int N> int run() const {
    const int64_t items = int64_t(batch) * heads;
    int status = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1) reduction(max : status)
    for (int64_t item = 0; item < items; item++)
      for (int column = 0; column < d_v; column += W * N) {
        const bool fine = slab<T, W, N>(item / heads, item % heads, column);
        status = fine ? status : 4;
      }
    return status;
  }

  // Add what the last block wrote, read for this one. Sums are local: what is only counted up stays in registers.
  template <class T, int W, int N, int Steps> NBS_SHARED void sweep(
      T* state, const T (*k_last)[kMaxDim], const T (*k)[kMaxDim], const T (*q)[kMaxDim],
      const V<T, W> (&write)[Steps][N], V<T, W> (&all_old)[Steps][N], V<T, W> (&all_y)[Steps][N]) const {
    V<T, W> old[Steps][N] = {}, y[Steps][N] = {};
    for (int e = 0; e < d_k; e++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        V<T, W> row = load<T, W>(state + (e * N + n) * W);
#pragma GCC unroll 4
        for (int s = 0; s < Steps; s++) delta_write_row(row, k_last[s][e], write[s][n]);
        store<T, W>(state + (e * N + n) * W, row);
#pragma GCC unroll 4
        for (int s = 0; s < Steps; s++) delta_read_row(row, k[s][e], q[s][e], old[s][n], y[s][n]);
      }
#pragma GCC unroll 4
    for (int s = 0; s < Steps; s++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        all_old[s][n] = old[s][n];
        all_y[s][n] = y[s][n];
      }
  }

  // False if a beta is not finite.
  template <class T, int W, int N> bool slab(int64_t b, int64_t h, int first) const {
    constexpr int Steps = NBS_REGISTERS >= 32 ? 4 : 2, Columns = W * N, Pairs = Steps * Steps + W;
    const int columns = d_v - first < Columns ? d_v - first : Columns, padded = round_up(d_k, W);
    alignas(64) T state[kMaxDim * Columns], q[Steps][kMaxDim], k[2][Steps][kMaxDim], buffer[Columns];
    alignas(64) T qk[Pairs], kk[Pairs];
    V<T, W> write[Steps][N] = {};
    for (int e = 0; e < d_k; e++)
      read_columns(4, t[4].at<T>(b, h, e), first, state + e * Columns, Columns, columns);
    std::memset(k, 0, sizeof(k));
    bool finite = true;
    for (int step = 0, now = 0; step < time; step += Steps, now = 1 - now) {
      const int real = time - step < Steps ? time - step : Steps;
      for (int s = 0; s < Steps; s++) {
        if (step + s + kAhead < time) {
          for (int i : {0, 1}) ahead(t[i].at<T>(b, step + s + kAhead, h), d_k);
          ahead(part(t[2], t[2].at<T>(b, step + s + kAhead, h), first), columns);
          for (int i : {5, 7}) ahead<true>(part(t[i], t[i].at<T>(b, step + s + kAhead, h), first), columns);
        }
        read(q[s], padded, s < real ? t[0].at<T>(b, step + s, h) : nullptr, t[0].stride[3], d_k);
        read(k[now][s], padded, s < real ? t[1].at<T>(b, step + s, h) : nullptr, t[1].stride[3], d_k);
      }
      for (int base = 0; base < Steps * Steps; base += W) {  // products of step s with step r, at s * Steps + r
        const auto pair = [&](int i, V<T, W>* x) __attribute__((always_inline)) {
          const int s = (base + i) / Steps, r = (base + i) % Steps;
          x[0] = x[1] = V<T, W>{};
          if (s < Steps && r <= s) x[0] = products<T, W>(q[s], k[now][r], padded);
          if (s < Steps && r < s) x[1] = products<T, W>(k[now][s], k[now][r], padded);
        };
        V<T, W> sums[2];
        Fold<T, W>::template rows<2>(pair, 0, sums);
        store<T, W>(qk + base, sums[0]);
        store<T, W>(kk + base, sums[1]);
      }
      V<T, W> old[Steps][N], y[Steps][N];
      sweep<T, W, N, Steps>(state, k[1 - now], k[now], q, write, old, y);
      for (int s = 0; s < Steps; s++) {
        if (s < real) {
          const T *qk_s = qk + s * Steps, *kk_s = kk + s * Steps;
          for (int r = 0; r < s; r++)
            for (int n = 0; n < N; n++) delta_earlier(kk_s[r], qk_s[r], write[r][n], old[s][n], y[s][n]);
          const T beta = *t[3].at<T>(b, step + s, h);
          finite &= bool(std::isfinite(beta));
          read_columns(2, t[2].at<T>(b, step + s, h), first, buffer, Columns, columns);
          for (int n = 0; n < N; n++) {
            V<T, W> error;
            delta_finish(load<T, W>(buffer + n * W), old[s][n], beta, qk_s[s], error, write[s][n], y[s][n]);
            store<T, W>(buffer + n * W, error);
          }
          ::write(part(t[7], t[7].at<T>(b, step + s, h), first), t[7].stride[3], buffer, columns);
          for (int n = 0; n < N; n++) store<T, W>(buffer + n * W, y[s][n]);
          ::write(part(t[5], t[5].at<T>(b, step + s, h), first), t[5].stride[3], buffer, columns);
        } else {
          for (int n = 0; n < N; n++) write[s][n] = V<T, W>{};
        }
      }
    }
    const int last = (time + Steps - 1) / Steps % 2 == 1 ? 0 : 1;
    for (int e = 0; e < d_k; e++) {
      for (int n = 0; n < N; n++) {
        V<T, W> row = load<T, W>(state + e * Columns + n * W);
        for (int s = 0; s < Steps; s++) delta_write_row(row, k[last][s][e], write[s][n]);
        store<T, W>(buffer + n * W, row);
      }
      ::write(part(t[6], t[6].at<T>(b, h, e), first), t[6].stride[3], buffer, columns);
    }
    return finite;
  }
};

// Tensors: q k v beta state final error | dy dfinal | dq dk dv dbeta dstate
struct Backward : Call {
  template <class T, int W, int N> int run() const {
    const int64_t items = int64_t(batch) * heads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t item = 0; item < items; item++)
      for (int column = 0; column < d_v; column += W * N) slab<T, W, N>(item / heads, item % heads, column);
    return 0;
  }

  // One sweep a step: it ends step t + 1 and begins step t. Before the first there is no t + 1, after the last no t.
  template <class T, int W, int N> void slab(int64_t b, int64_t h, int first) const {
    constexpr int Columns = W * N;
    const int columns = d_v - first < Columns ? d_v - first : Columns, rows = round_up(d_k, W);
    alignas(64) T state[kMaxDim * Columns], grad[kMaxDim * Columns], buffer[Columns];
    alignas(64) T q[kMaxDim], k[2][kMaxDim], dq[kMaxDim], dk[kMaxDim];
    V<T, W> write[N] = {}, r[N] = {}, dy[N];
    for (int e = 0; e < rows; e++) {
      const bool real = e < d_k;
      read_columns(5, real ? t[5].at<T>(b, h, e) : nullptr, first, state + e * Columns, Columns, columns);
      read_columns(8, real ? t[8].at<T>(b, h, e) : nullptr, first, grad + e * Columns, Columns, columns);
    }
    std::memset(k, 0, sizeof(k));
    for (int step = time - 1, now = 0; step >= -1; step--, now = 1 - now) {
      const bool real = step >= 0;
      if (step >= kAhead) {
        for (int i : {0, 1}) ahead(t[i].at<T>(b, step - kAhead, h), d_k);
        for (int i : {9, 10}) ahead<true>(t[i].at<T>(b, step - kAhead, h), d_k);
        for (int i : {6, 7}) ahead(part(t[i], t[i].at<T>(b, step - kAhead, h), first), columns);
        ahead<true>(part(t[11], t[11].at<T>(b, step - kAhead, h), first), columns);
      }
      read(q, rows, real ? t[0].at<T>(b, step, h) : nullptr, t[0].stride[3], d_k);
      read(k[now], rows, real ? t[1].at<T>(b, step, h) : nullptr, t[1].stride[3], d_k);
      read_columns(7, real ? t[7].at<T>(b, step, h) : nullptr, first, buffer, Columns, columns);
      for (int n = 0; n < N; n++) dy[n] = load<T, W>(buffer + n * W);
      V<T, W> a[N] = {};
      const T *k_now = k[now], *k_next = k[1 - now];
      for (int group = 0; group < rows; group += W) {
        const auto row = [&](int e, V<T, W>* sums) __attribute__((always_inline)) {
          sums[0] = sums[1] = V<T, W>{};
          for (int n = 0; n < N; n++) {
            T *at_state = state + e * Columns + n * W, *at_grad = grad + e * Columns + n * W;
            V<T, W> S = load<T, W>(at_state), G = load<T, W>(at_grad);
            delta_backward_row(S, G, k_next[e], write[n], r[n], k_now[e], q[e], dy[n], sums[0], sums[1], a[n]);
            store<T, W>(at_state, S);
            store<T, W>(at_grad, G);
          }
        };
        V<T, W> sums[2];
        Fold<T, W>::template rows<2>(row, group, sums);
        store<T, W>(dk + group, sums[0]);
        store<T, W>(dq + group, sums[1]);
      }
      if (step + 1 < time) ::write(t[10].at<T>(b, step + 1, h), t[10].stride[3], dk, d_k, first > 0);
      if (!real) break;
      ::write(t[9].at<T>(b, step, h), t[9].stride[3], dq, d_k, first > 0);
      const T beta = *t[3].at<T>(b, step, h);
      V<T, W> error_a = {};
      read_columns(6, t[6].at<T>(b, step, h), first, buffer, Columns, columns);
      for (int n = 0; n < N; n++) {
        const V<T, W> error = load<T, W>(buffer + n * W);
        error_a += error * a[n];
        write[n] = beta * error;
        V<T, W> dv;
        delta_backward_finish(a[n], beta, dv, r[n]);
        store<T, W>(buffer + n * W, dv);
      }
      ::write(part(t[11], t[11].at<T>(b, step, h), first), t[11].stride[3], buffer, columns);
      T* dbeta = t[12].at<T>(b, step, h);
      *dbeta = (first > 0 ? *dbeta : T(0)) + sum<T, W>(error_a);
    }
    for (int e = 0; e < d_k; e++)
      ::write(part(t[13], t[13].at<T>(b, h, e), first), t[13].stride[3], grad + e * Columns, columns);
  }
};

}  // namespace

NBS_KERNELS(delta)
