// WKV on the CPU. Heads are independent; a slab of columns of the state stays in the nearest cache, and forwards one sweep
// over its rows serves a few steps. Backwards the states run forward once more for dr, then their gradients backward.
#include "sweeps.h"
#include "wkv.h"

namespace {

constexpr int kMaxDim = 256, kAhead = 12;
enum { kR, kK, kV, kW, kU, kState, kInputs };

struct Call : SlabCall {
  // Numbers (batch, step, head) for all keys, with zeros behind them and where there is no such step.
  template <class T> void keys(int i, T* to, int padded, int64_t b, int step, int64_t h) const {
    read(to, padded, step < time ? t[i].at<T>(b, step, h) : nullptr, t[i].stride[3], d_k);
  }
  // From raw numbers to -log w and w; a step that is not there fades nothing.
  template <class T, int W> void fade(T* w, T* rate, int padded, int64_t b, int step, int64_t h) const {
    keys(kW, w, padded, b, step, h);
    for (int e = 0; e < padded; e += W) {
      const V<T, W> x = step < time ? exponential<T, W>(load<T, W>(w + e)) : V<T, W>{};
      if (rate) store<T, W>(rate + e, x);
      store<T, W>(w + e, two_to<T, W>(x * T(-kLog2E)));
    }
  }
  // Columns of a slab.
  template <class T, int W, int N> void columns(const Tensor& x, const T* row, int first, V<T, W>* to) const {
    for (int n = 0; n < N; n++, first += W)
      to[n] = get<T, W>(moved(row, first * x.stride[3]), x.stride[3], d_v - first < W ? d_v - first : W);
  }
  template <class T, int W, int N> void put_columns(const Tensor& x, T* row, int first, const V<T, W>* from) const {
    for (int n = 0; n < N; n++, first += W)
      put<T, W>(moved(row, first * x.stride[3]), x.stride[3], from[n], d_v - first < W ? d_v - first : W);
  }
  template <class T, int W, int N> void rows(const Tensor& x, int64_t b, int64_t h, int first, T* to) const {
    for (int e = 0; e < d_k; e++) {
      V<T, W> row[N];
      columns<T, W, N>(x, x.at<T>(b, h, e), first, row);
      store_tile<T, W, N>(to + e * W * N, row);
    }
  }
  template <class T, int W, int N> void put_rows(const Tensor& x, int64_t b, int64_t h, int first, const T* from) const {
    for (int e = 0; e < d_k && x.address; e++) {
      V<T, W> row[N];
      load_tile<T, W, N>(row, from + e * W * N);
      put_columns<T, W, N>(x, x.at<T>(b, h, e), first, row);
    }
  }
};

// Tensors: r k v w u state | y final
struct Forward : Call {
  template <class T, int W, int N> int run() const {
    const int padded = round_up(d_k, W);
    const size_t numbers = size_t(padded) * (W * N + 3 * kSteps + 1);
    return each_head<T>(batch, heads, threads, numbers, [=](int64_t b, int64_t h, T* memory) {
      for (int first = 0; first < d_v; first += W * N) slab<T, W, N>(b, h, first, padded, Pieces<T>{memory});
      return 0;
    });
  }

  static constexpr int kSteps = NBS_REGISTERS >= 32 ? 4 : 2;

  template <class T, int W, int N> NBS_SHARED void sweep(T* state, const T* w, const T* k, const T* r, int width,
                                                         const V<T, W> (&v)[kSteps][N], V<T, W> (&all_y)[kSteps][N]) const {
    V<T, W> y[kSteps][N] = {};
    for (int e = 0; e < d_k; e++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        V<T, W> row = load<T, W>(state + (e * N + n) * W);
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; s++)
          wkv_forward_row(row, w[s * width + e], k[s * width + e], v[s][n], r[s * width + e], y[s][n]);
        store<T, W>(state + (e * N + n) * W, row);
      }
    for (int s = 0; s < kSteps; s++)
      for (int n = 0; n < N; n++) all_y[s][n] += y[s][n];
  }

  template <class T, int W, int N> void slab(int64_t b, int64_t h, int first, int padded, Pieces<T> piece) const {
    T *state = piece(padded * W * N), *u = piece(padded);
    T *r = piece(kSteps * padded), *k = piece(kSteps * padded), *w = piece(kSteps * padded);
    rows<T, W, N>(t[kState], b, h, first, state);
    read(u, padded, t[kU].at<T>(h, 0), t[kU].stride[1], d_k);
    for (int step = 0; step < time; step += kSteps) {
      V<T, W> v[kSteps][N], y[kSteps][N];
      for (int s = 0; s < kSteps; s++) {
        const int now = step + s, later = now + kAhead;
        if (later < time) {
          for (int i : {kR, kK, kW}) ahead(t[i].at<T>(b, later, h), d_k);
          ahead(t[kV].at<T>(b, later, h), d_v);
        }
        keys(kR, r + s * padded, padded, b, now, h);
        keys(kK, k + s * padded, padded, b, now, h);
        fade<T, W>(w + s * padded, static_cast<T*>(nullptr), padded, b, now, h);
        columns<T, W, N>(t[kV], now < time ? t[kV].at<T>(b, now, h) : nullptr, first, v[s]);
        V<T, W> bonus = {};
        for (int e = 0; e < padded; e += W)
          bonus += load<T, W>(r + s * padded + e) * load<T, W>(u + e) * load<T, W>(k + s * padded + e);
        const T total = sum<T, W>(bonus);
        for (int n = 0; n < N; n++) y[s][n] = total * v[s][n];
      }
      sweep<T, W, N>(state, w, k, r, padded, v, y);
      for (int s = 0; s < kSteps && step + s < time; s++)
        put_columns<T, W, N>(t[kInputs], t[kInputs].at<T>(b, step + s, h), first, y[s]);
    }
    put_rows<T, W, N>(t[kInputs + 1], b, h, first, state);
  }
};

// Tensors: r k v w u state, final | dy dfinal | dr dk dv dw du dstate
struct Backward : Call {
  template <class T, int W, int N> int run() const {
    const int padded = round_up(d_k, W);
    const size_t numbers = size_t(padded) * (W * N + 11 + time);
    return each_head<T>(batch, heads, threads, numbers, [=](int64_t b, int64_t h, T* memory) {
      for (int first = 0; first < d_v; first += W * N) slab<T, W, N>(b, h, first, padded, Pieces<T>{memory});
      return 0;
    });
  }

  template <class T, int W, int N> void slab(int64_t b, int64_t h, int first, int padded, Pieces<T> piece) const {
    const Tensor *last = t + kInputs, *dy = last + 1, *dlast = dy + 1, *d = dlast + 1;
    T *S = piece(padded * W * N), *u = piece(padded), *r = piece(padded), *k = piece(padded), *w = piece(padded);
    T *rate = piece(padded), *dk = piece(padded), *dw = piece(padded), *du = piece(padded), *product = piece(padded);
    T* dr = piece(int64_t(time) * padded);
    const bool more = first > 0;
    V<T, W> v[N], g[N];
    rows<T, W, N>(t[kState], b, h, first, S);
    read(u, padded, t[kU].at<T>(h, 0), t[kU].stride[1], d_k);
    for (int step = 0; step < time; step++) {
      if (step + kAhead < time) {
        for (int i : {kR, kK, kW}) ahead(t[i].at<T>(b, step + kAhead, h), d_k);
        ahead(t[kV].at<T>(b, step + kAhead, h), d_v);
        ahead(dy->at<T>(b, step + kAhead, h), d_v);
      }
      keys(kK, k, padded, b, step, h);
      fade<T, W>(w, static_cast<T*>(nullptr), padded, b, step, h);
      columns<T, W, N>(t[kV], t[kV].at<T>(b, step, h), first, v);
      columns<T, W, N>(*dy, dy->at<T>(b, step, h), first, g);
      T* sums = dr + int64_t(step) * padded;
      sum_rows<T, W, 1>(&sums, false, padded, [&](int e, V<T, W>* x) __attribute__((always_inline)) {
        x[0] = V<T, W>{};
        for (int n = 0; n < N; n++) {
          V<T, W> row = load<T, W>(S + (e * N + n) * W);
          wkv_again_row(row, w[e], k[e], v[n], g[n], x[0]);
          store<T, W>(S + (e * N + n) * W, row);
        }
      });
    }
    // From here on S is the gradient of the state.
    for (int e = 0; e < d_k; e++) {
      V<T, W> total = {}, row[N];
      columns<T, W, N>(*dlast, dlast->at<T>(b, h, e), first, row);
      for (int n = 0; n < N; n++) total += load<T, W>(S + (e * N + n) * W) * row[n];
      store_tile<T, W, N>(S + e * W * N, row);
      product[e] = sum<T, W>(total);
    }
    for (int step = time - 1; step >= 0; step--) {
      keys(kR, r, padded, b, step, h);
      keys(kK, k, padded, b, step, h);
      fade<T, W>(w, rate, padded, b, step, h);
      columns<T, W, N>(t[kV], t[kV].at<T>(b, step, h), first, v);
      columns<T, W, N>(*dy, dy->at<T>(b, step, h), first, g);
      V<T, W> dv[N] = {}, total = {};
      sum_rows<T, W, 1>(&dk, false, padded, [&](int e, V<T, W>* x) __attribute__((always_inline)) {
        x[0] = V<T, W>{};
        for (int n = 0; n < N; n++) {
          V<T, W> row = load<T, W>(S + (e * N + n) * W);
          wkv_backward_row(row, w[e], k[e], v[n], r[e], g[n], x[0], dv[n]);
          store<T, W>(S + (e * N + n) * W, row);
        }
      });
      for (int n = 0; n < N; n++) total += v[n] * g[n];
      const V<T, W> bonus = V<T, W>{} + sum<T, W>(total);
      V<T, W> ruk = {};
      T* dr_step = dr + int64_t(step) * padded;
      for (int e = 0; e < padded; e += W) {
        V<T, W> at_product = load<T, W>(product + e), at_dr = load<T, W>(dr_step + e), at_dk = load<T, W>(dk + e), at_dw;
        V<T, W> at_du = load<T, W>(du + e);
        const V<T, W> at_r = load<T, W>(r + e), at_k = load<T, W>(k + e), at_u = load<T, W>(u + e);
        wkv_keys(at_product, load<T, W>(rate + e), sizeof(T) == 4 ? T(16) : T(36), at_r, at_k, at_u, bonus, at_dr, at_dk,
                 at_dw, at_du);
        ruk += at_r * at_u * at_k;
        store<T, W>(product + e, at_product);
        store<T, W>(dr_step + e, at_dr);
        store<T, W>(dk + e, at_dk);
        store<T, W>(dw + e, at_dw);
        store<T, W>(du + e, at_du);
      }
      const T share = sum<T, W>(ruk);
      for (int n = 0; n < N; n++) dv[n] += share * g[n];
      put_columns<T, W, N>(d[kV], d[kV].at<T>(b, step, h), first, dv);
      write(d[kR].at<T>(b, step, h), d[kR].stride[3], dr_step, d_k, more);
      write(d[kK].at<T>(b, step, h), d[kK].stride[3], dk, d_k, more);
      write(d[kW].at<T>(b, step, h), d[kW].stride[3], dw, d_k, more);
    }
    write(d[kU].at<T>(b, h), d[kU].stride[2], du, d_k, more);
    put_rows<T, W, N>(d[kState], b, h, first, S);
  }
};

}  // namespace

NBS_KERNELS(wkv)
