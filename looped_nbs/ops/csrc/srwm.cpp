// Self-referential weight matrix on the CPU. The matrices of outputs, queries, keys and rates stand side by side in
// padded rows of y | q | k | b, so that each of the two sweeps of a step goes through all four; the write of a step is
// put off to the first sweep of the next one.
#include "srwm.h"
#include "sweeps.h"

namespace {

constexpr int kRates = 4;

// Where the four matrices stand in a row, for registers of W lanes.
template <int W> struct Row {
  int dim, padded, width;
  explicit Row(int dim) : dim(dim), padded(round_up(dim, W)), width(3 * padded + round_up(kRates, W)) {}
  int columns(int i) const { return i < 3 ? dim : kRates; }
  int space(int i) const { return i < 3 ? padded : round_up(kRates, W); }

  template <class T> void read_all(T* M, const Tensor* four, int64_t b, int64_t h) const {
    for (int i = 0; i < 4; i++)
      read_matrix(M + i * padded, width, space(i), four[i].at<T>(b, h), four[i].stride + 2, dim, columns(i));
  }
  template <class T> void write_all(const Tensor* four, int64_t b, int64_t h, const T* M) const {
    for (int i = 0; i < 4; i++)
      write_matrix(four[i].at<T>(b, h), four[i].stride + 2, M + i * padded, width, dim, columns(i));
  }
  // to = from, each part times its rate
  template <class T> void scale(T* to, const T* rates, const T* from) const {
    for (int i = 0; i < 4; i++)
      for (int j = i * padded; j < i * padded + space(i); j += W)
        store<T, W>(to + j, rates[i] * load<T, W>(from + j));
  }
};

// Tensors: x W_y W_q W_k w_b | y, four final matrices, query key moved_{y,q,k,b} rates
struct Forward : HeadCall {
  template <class T, int W> int run() const {
    const size_t padded = round_up(dim, W), width = Row<W>(dim).width;
    return each_head<T>(batch, heads, threads, padded * width + 3 * padded + 3 * width,
                        [this](int64_t b, int64_t h, T* memory) { return head<T, W>(b, h, memory); });
  }

  template <class T, int W> int head(int64_t b, int64_t h, T* memory) const {
    const Row<W> row(dim);
    const int padded = row.padded, width = row.width;
    Pieces<T> piece{memory};
    T *M = piece(padded * width), *x = piece(padded), *k_before = piece(padded), *change = piece(padded);
    T *z = piece(width), *moved = piece(width), *u = piece(width), rates[kRates];
    T *q = z + padded, *k = z + 2 * padded, *b_in = z + 3 * padded;
    row.read_all(M, t + 1, b, h);
    for (int step = 0; step < time; step++) {
      read(x, padded, t[0].at<T>(b, step, h), t[0].stride[3], dim);
      sweep<T, W>(M, width, k_before, u, x, z);
      write(t[5].at<T>(b, step, h), t[5].stride[3], z, dim);
      softmax<T, W>(q, padded, dim);
      softmax<T, W>(k, padded, dim);
      for (int i = 0; i < kRates; i++) rates[i] = logistic_number(b_in[i]);
      for (int i = 0; i < padded; i += W) store<T, W>(change + i, load<T, W>(q + i) - load<T, W>(k + i));
      for (int i = 0; i < width; i += W) store<T, W>(moved + i, V<T, W>{});
      add_vecmat<T, W>(moved, change, M, dim, width);
      row.scale(u, rates, moved);
      copy(k_before, k, padded);
      if (!t[10].address) continue;  // nothing is kept
      write(t[10].at<T>(b, step, h), t[10].stride[3], q, dim);
      write(t[11].at<T>(b, step, h), t[11].stride[3], k, dim);
      for (int i = 0; i < 4; i++)
        write(t[12 + i].at<T>(b, step, h), t[12 + i].stride[3], moved + i * padded, row.columns(i));
      write(t[16].at<T>(b, step, h), t[16].stride[3], rates, kRates);
    }
    add_outers<T, W>(M, k_before, padded, u, 1, dim, width);
    row.write_all(t + 6, b, h, M);
    return 0;
  }

  template <class T, int W> void sweep(T* M, int width, const T* k_before, const T* u_all, const T* x, T* z_all) const {
    tiles(width / W, [=](auto size, int first) {
      constexpr int n = decltype(size)::value;
      V<T, W> u[n], z[n] = {};
      load_tile<T, W, n>(u, u_all + first * W);
      for (int e = 0; e < dim; e++)
        for (int i = 0; i < n; i++) {
          T* at = M + e * width + (first + i) * W;
          V<T, W> m = load<T, W>(at);
          srwm_forward_row(m, k_before[e], u[i], x[e], z[i]);
          store<T, W>(at, m);
        }
      store_tile<T, W, n>(z_all + first * W, z);
    });
  }
};

// Tensors: x W_y W_q W_k w_b, four final matrices, query key moved_{y,q,k,b} rates | dy, of the four | dx, of the four
struct Backward : HeadCall {
  template <class T, int W> int run() const {
    const size_t padded = round_up(dim, W), width = Row<W>(dim).width;
    return each_head<T>(batch, heads, threads, 2 * padded * width + 7 * padded + 5 * width,
                        [this](int64_t b, int64_t h, T* memory) { return head<T, W>(b, h, memory); });
  }

  template <class T, int W> int head(int64_t b, int64_t h, T* memory) const {
    const Row<W> row(dim);
    const int padded = row.padded, width = row.width;
    Pieces<T> piece{memory};
    T *M = piece(padded * width), *G = piece(padded * width), *x = piece(padded), *q = piece(padded), *k = piece(padded);
    T *change = piece(padded), *dx = piece(padded), *pulled = piece(padded), *wrote = piece(padded);
    T *moved = piece(width), *u = piece(width), *a = piece(width), *e = piece(width), *dz = piece(width);
    T *dq = dz + padded, *dk = dz + 2 * padded, *db = dz + 3 * padded, rates[kRates];
    row.read_all(M, t + 5, b, h);
    row.read_all(G, t + 17, b, h);
    for (int step = time - 1; step >= 0; step--) {
      read(x, padded, t[0].at<T>(b, step, h), t[0].stride[3], dim);
      read(q, padded, t[9].at<T>(b, step, h), t[9].stride[3], dim);
      read(k, padded, t[10].at<T>(b, step, h), t[10].stride[3], dim);
      for (int i = 0; i < 4; i++)
        read(moved + i * padded, row.space(i), t[11 + i].at<T>(b, step, h), t[11 + i].stride[3], row.columns(i));
      read(rates, kRates, t[15].at<T>(b, step, h), t[15].stride[3], kRates);
      read(dz, padded, t[16].at<T>(b, step, h), t[16].stride[3], dim);
      for (int i = 0; i < padded; i += W) store<T, W>(change + i, load<T, W>(q + i) - load<T, W>(k + i));
      row.scale(u, rates, moved);
      for (int i = 0; i < width; i += W) store<T, W>(a + i, V<T, W>{});
      add_vecmat<T, W>(a, k, G, dim, width);
      for (int i = 0; i < kRates; i++)
        db[i] = dot<T, W>(a + i * padded, moved + i * padded, row.space(i)) * rates[i] * (1 - rates[i]);
      row.scale(e, rates, a);
      write_backward<T, W>(M, G, width, k, u, change, e, pulled, wrote);
      for (int i = 0; i < padded; i += W) {
        store<T, W>(dq + i, load<T, W>(pulled + i));
        store<T, W>(dk + i, load<T, W>(wrote + i) - load<T, W>(pulled + i));
      }
      softmax_backward<T, W>(dq, q, padded);
      softmax_backward<T, W>(dk, k, padded);
      read_backward<T, W>(M, G, width, x, dz, dx);
      write(t[21].at<T>(b, step, h), t[21].stride[3], dx, dim);
    }
    row.write_all(t + 22, b, h, G);
    return 0;
  }

  template <class T, int W> void write_backward(T* M, T* G, int width, const T* k, const T* u_all, const T* change,
                                                const T* e_all, T* pulled, T* wrote) const {
    const int padded = round_up(dim, W);
    tiles(width / W, [=](auto size, int first) {
      constexpr int n = decltype(size)::value;
      V<T, W> u[n], e[n];
      load_tile<T, W, n>(u, u_all + first * W);
      load_tile<T, W, n>(e, e_all + first * W);
      T* const to[] = {pulled, wrote};
      sum_rows<T, W, 2>(to, first > 0, padded, [&](int row, V<T, W>* sums) __attribute__((always_inline)) {
        sums[0] = sums[1] = V<T, W>{};
        for (int i = 0; i < n; i++) {
          const int at = row * width + (first + i) * W;
          V<T, W> m = load<T, W>(M + at), g = load<T, W>(G + at);
          srwm_wrote_row(g, u[i], sums[1]);
          srwm_moved_row(m, g, k[row], u[i], change[row], e[i], sums[0]);
          store<T, W>(M + at, m);
          store<T, W>(G + at, g);
        }
      });
    });
  }

  template <class T, int W> void read_backward(const T* M, T* G, int width, const T* x, const T* dz_all, T* dx) const {
    const int padded = round_up(dim, W);
    tiles(width / W, [=](auto size, int first) {
      constexpr int n = decltype(size)::value;
      V<T, W> dz[n];
      load_tile<T, W, n>(dz, dz_all + first * W);
      sum_rows<T, W, 1>(&dx, first > 0, padded, [&](int row, V<T, W>* total) __attribute__((always_inline)) {
        total[0] = V<T, W>{};
        for (int i = 0; i < n; i++) {
          const int at = row * width + (first + i) * W;
          V<T, W> g = load<T, W>(G + at);
          srwm_read_backward_row(load<T, W>(M + at), g, x[row], dz[i], total[0]);
          store<T, W>(G + at, g);
        }
      });
    });
  }
};

}  // namespace

NBS_KERNELS(srwm)
