// Recurrent delta rule on the CPU. Heads are independent; memory and recurrent weights of a head stay in the nearest
// cache. The write of a step is put off to the sweep of the next one, so that the memory is swept once for each step.
#include "recurrent_delta.h"
#include "sweeps.h"

namespace {

// Tensors: q k v beta R_q R_k R_v r_beta W y0 | y final_W final_y query key difference rate before
struct Forward : HeadCall {
  template <class T, int W> int run() const {
    const size_t width = round_up(dim, W);
    return each_head<T>(batch, heads, threads, (4 * width + 11) * width,
                        [this](int64_t b, int64_t h, T* memory) { return head<T, W>(b, h, memory); });
  }

  template <class T, int W> int head(int64_t b, int64_t h, T* memory) const {
    const int width = round_up(dim, W);
    Pieces<T> piece{memory};
    T *state = piece(width * width), *R = piece(3 * width * width), *r = piece(width), *s = piece(width);
    T *z = piece(3 * width), *found = piece(width), *y = piece(width), *k_before = piece(width), *u = piece(width);
    T *q = z, *k = z + width, *v = z + 2 * width;
    read_matrix(state, width, width, t[8].at<T>(b, h), t[8].stride + 2, dim, dim);
    for (int i = 0; i < 3; i++)
      read_matrix(R + i * width, 3 * width, width, t[4 + i].at<T>(h, 0), t[4 + i].stride + 1, dim, dim);
    read(r, width, t[7].at<T>(h, 0), t[7].stride[1], dim);
    read(y, width, t[9].at<T>(b, h), t[9].stride[2], dim);
    for (int step = 0; step < time; step++) {
      const T rate_in = *t[3].at<T>(b, step, h);
      if (!std::isfinite(rate_in)) return 4;
      for (int i = 0; i < width; i += W) store<T, W>(s + i, hyperbolic<T, W>(load<T, W>(y + i)));
      for (int i = 0; i < 3; i++) read(z + i * width, width, t[i].at<T>(b, step, h), t[i].stride[3], dim);
      add_vecmat<T, W>(z, s, R, dim, 3 * width);
      softmax<T, W>(q, width, dim);
      softmax<T, W>(k, width, dim);
      const T rate = logistic_number(rate_in + dot<T, W>(r, s, width));
      sweep<T, W>(state, width, k_before, u, k, q, found, y);
      const T both = dot<T, W>(q, k, width);
      for (int i = 0; i < width; i += W) {
        const V<T, W> difference = load<T, W>(v + i) - load<T, W>(found + i);
        store<T, W>(found + i, difference);
        store<T, W>(u + i, rate * difference);
        store<T, W>(y + i, load<T, W>(y + i) + (both * rate) * difference);
      }
      copy(k_before, k, width);
      write(t[10].at<T>(b, step, h), t[10].stride[3], y, dim);
      if (!t[13].address) continue;  // nothing is kept
      const T* kept[] = {q, k, found, &rate, s};
      for (int i = 0; i < 5; i++)
        write(t[13 + i].at<T>(b, step, h), t[13 + i].stride[3], kept[i], i == 3 ? 1 : dim);
    }
    add_outers<T, W>(state, k_before, width, u, 1, dim, width);
    write_matrix(t[11].at<T>(b, h), t[11].stride + 2, state, width, dim, dim);
    write(t[12].at<T>(b, h), t[12].stride[2], y, dim);
    return 0;
  }

  template <class T, int W> void sweep(T* state, int width, const T* k_before, const T* u_before, const T* k,
                                       const T* q, T* found, T* y) const {
    tiles<kTile / 2>(width / W, [=](auto size, int first) {
      constexpr int n = decltype(size)::value, ways = n > 2 ? 1 : 2;
      V<T, W> u[n], a[ways][n] = {}, c[ways][n] = {};
      load_tile<T, W, n>(u, u_before + first * W);
      const auto row = [&](int e, int way) __attribute__((always_inline)) {
        for (int i = 0; i < n; i++) {
          T* at = state + e * width + (first + i) * W;
          V<T, W> x = load<T, W>(at);
          recurrent_delta_forward_row(x, k_before[e], u[i], k[e], q[e], a[way][i], c[way][i]);
          store<T, W>(at, x);
        }
      };
      int e = 0;
      for (; e + ways <= dim; e += ways)
        for (int way = 0; way < ways; way++) row(e + way, way);
      for (; e < dim; e++) row(e, 0);
      for (int way = 1; way < ways; way++)
        for (int i = 0; i < n; i++) {
          a[0][i] += a[way][i];
          c[0][i] += c[way][i];
        }
      store_tile<T, W, n>(found + first * W, a[0]);
      store_tile<T, W, n>(y + first * W, c[0]);
    });
  }
};

// Tensors: the ten of Forward, final_W final_y query key difference rate before | dy dfinal_W dfinal_y | those of the ten
// Gradients of the recurrent weights come out for every row of the batch.
struct Backward : HeadCall {
  static constexpr int Block = 16;  // steps whose share of the gradients of R is added in one sweep

  template <class T, int W> int run() const {
    const size_t width = round_up(dim, W);
    return each_head<T>(batch, heads, threads, (8 * width + 11 + 4 * Block) * width,
                        [this](int64_t b, int64_t h, T* memory) { return head<T, W>(b, h, memory); });
  }

  template <class T, int W> int head(int64_t b, int64_t h, T* memory) const {
    const int width = round_up(dim, W);
    Pieces<T> piece{memory};
    T *state = piece(width * width), *grad = piece(width * width), *R = piece(3 * width * width);
    T *dR = piece(3 * width * width), *r = piece(width), *dr = piece(width), *q = piece(width), *k = piece(width);
    T *difference = piece(width), *u = piece(width), *dy = piece(width), *dw = piece(width), *dfound = piece(width);
    T *more = piece(width), *ds = piece(width), *S = piece(Block * width), *Z = piece(3 * Block * width);
    read_matrix(state, width, width, t[10].at<T>(b, h), t[10].stride + 2, dim, dim);
    read_matrix(grad, width, width, t[18].at<T>(b, h), t[18].stride + 2, dim, dim);
    for (int i = 0; i < 3; i++)
      read_matrix(R + i * width, 3 * width, width, t[4 + i].at<T>(h, 0), t[4 + i].stride + 1, dim, dim);
    read(r, width, t[7].at<T>(h, 0), t[7].stride[1], dim);
    read(dy, width, t[19].at<T>(b, h), t[19].stride[2], dim);
    for (int step = time - 1, filled = 0; step >= 0; step--) {
      T *s = S + filled * width, *dq = Z + filled * 3 * width, *dk = dq + width, *dv = dk + width;
      T* kept[] = {q, k, difference, nullptr, s};
      for (int i = 0; i < 5; i++)
        if (kept[i]) read(kept[i], width, t[12 + i].at<T>(b, step, h), t[12 + i].stride[3], dim);
      const T rate = *t[15].at<T>(b, step, h);
      read(more, width, t[17].at<T>(b, step, h), t[17].stride[3], dim);
      for (int i = 0; i < width; i += W) {
        store<T, W>(dy + i, load<T, W>(dy + i) + load<T, W>(more + i));
        store<T, W>(u + i, rate * load<T, W>(difference + i));
      }
      read_backward<T, W>(state, grad, width, k, u, q, dy, dq, dw);
      softmax_backward<T, W>(dq, q, width);
      const T drate = dot<T, W>(dw, difference, width) * rate * (1 - rate);
      for (int i = 0; i < width; i += W) {
        store<T, W>(dv + i, rate * load<T, W>(dw + i));
        store<T, W>(dfound + i, -rate * load<T, W>(dw + i));
      }
      write_backward<T, W>(state, grad, width, k, u, dfound, dk);
      softmax_backward<T, W>(dk, k, width);
      for (int i = 0; i < 3; i++) write(t[20 + i].at<T>(b, step, h), t[20 + i].stride[3], dq + i * width, dim);
      *t[23].at<T>(b, step, h) = drate;
      matvec<T, W>(ds, R, dq, width, 3 * width);
      for (int i = 0; i < width; i += W) {
        const V<T, W> x = load<T, W>(s + i);
        store<T, W>(dr + i, load<T, W>(dr + i) + drate * x);
        store<T, W>(dy + i, (T(1) - x * x) * (load<T, W>(ds + i) + drate * load<T, W>(r + i)));
      }
      if (++filled == Block || !step) {
        add_outers<T, W>(dR, S, width, Z, filled, dim, 3 * width);
        filled = 0;
      }
    }
    for (int i = 0; i < 3; i++)
      write_matrix(t[24 + i].at<T>(b, h), t[24 + i].stride + 2, dR + i * width, 3 * width, dim, dim);
    write(t[27].at<T>(b, h), t[27].stride[2], dr, dim);
    write_matrix(t[28].at<T>(b, h), t[28].stride + 2, grad, width, dim, dim);
    write(t[29].at<T>(b, h), t[29].stride[2], dy, dim);
    return 0;
  }

  template <class T, int W> void read_backward(T* state, T* grad, int width, const T* k, const T* u_all,
                                               const T* q, const T* dy_all, T* dq, T* dw_all) const {
    tiles<kTile / 2>(width / W, [=](auto size, int first) {
      constexpr int n = decltype(size)::value;
      V<T, W> u[n], dy[n], dw[n] = {};
      load_tile<T, W, n>(u, u_all + first * W);
      load_tile<T, W, n>(dy, dy_all + first * W);
      sum_rows<T, W, 1>(&dq, first > 0, width, [&](int e, V<T, W>* total) __attribute__((always_inline)) {
        total[0] = V<T, W>{};
        for (int i = 0; i < n; i++) {
          T *at = state + e * width + (first + i) * W, *at_grad = grad + e * width + (first + i) * W;
          V<T, W> x = load<T, W>(at), g = load<T, W>(at_grad);
          recurrent_delta_read_backward_row(x, g, k[e], u[i], q[e], dy[i], total[0], dw[i]);
          store<T, W>(at, x);
          store<T, W>(at_grad, g);
        }
      });
      store_tile<T, W, n>(dw_all + first * W, dw);
    });
  }

  template <class T, int W> void write_backward(const T* state, T* grad, int width, const T* k, const T* u_all,
                                                const T* dfound_all, T* dk) const {
    tiles<kTile / 2>(width / W, [=](auto size, int first) {
      constexpr int n = decltype(size)::value;
      V<T, W> u[n], dfound[n];
      load_tile<T, W, n>(u, u_all + first * W);
      load_tile<T, W, n>(dfound, dfound_all + first * W);
      sum_rows<T, W, 1>(&dk, first > 0, width, [&](int e, V<T, W>* total) __attribute__((always_inline)) {
        total[0] = V<T, W>{};
        for (int i = 0; i < n; i++) {
          const int at = e * width + (first + i) * W;
          V<T, W> g = load<T, W>(grad + at);
          recurrent_delta_write_backward_row(load<T, W>(state + at), g, k[e], u[i], dfound[i], total[0]);
          store<T, W>(grad + at, g);
        }
      });
    });
  }
};

}  // namespace

NBS_KERNELS(recurrent_delta)
