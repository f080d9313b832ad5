// Element-wise LSTM on the CPU. A tile of a few registers of channels, which may belong to several heads, goes through
// time: wide enough that the gates of one register need not wait for those of another.
#include "elementwise_lstm.h"
#include "sweeps.h"

namespace {

constexpr int kRegisters = NBS_REGISTERS / 8;

// Registers of channels of one example: each belongs to one head.
template <class T, int W> struct Channels {
  const Tensor* t;
  int64_t b, h[kRegisters];
  int first[kRegisters], n[kRegisters], count;

  Channels(const Tensor* t, int64_t b, int tile, int heads, int dim) : t(t), b(b), count(0) {
    const int each = (dim + W - 1) / W;
    for (int i = tile * kRegisters; i < (tile + 1) * kRegisters && i < each * heads; i++, count++) {
      h[count] = i / each;
      first[count] = i % each * W;
      n[count] = dim - first[count] < W ? dim - first[count] : W;
    }
  }

  // Register i of a tensor (batch, time, heads, dim), (batch, heads, dim) or (heads, dim)
  T* step(int at, int time, int i) const { return moved(t[at].at<T>(b, time, h[i]), first[i] * t[at].stride[3]); }
  T* state(int at, int i) const { return moved(t[at].at<T>(b, h[i]), first[i] * t[at].stride[2]); }
  T* weight(int at, int i) const { return moved(t[at].at<T>(h[i], 0), first[i] * t[at].stride[1]); }
};

struct Call : HeadCall {
  template <class T, int W, class F> int each_tile(const F& f) const {
    const int tiles = (heads * ((dim + W - 1) / W) + kRegisters - 1) / kRegisters;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t item = 0; item < int64_t(batch) * tiles; item++)
      f(Channels<T, W>(t, item / tiles, item % tiles, heads, dim));
    return 0;
  }
};

// Tensors: z f w_z w_f c0 | c final before
struct Forward : Call {
  template <class T, int W> int run() const {
    return each_tile<T, W>([this](const Channels<T, W>& at) {
      V<T, W> c[kRegisters], w_z[kRegisters], w_f[kRegisters];
      for (int i = 0; i < at.count; i++) {
        c[i] = get<T, W>(at.state(4, i), t[4].stride[2], at.n[i]);
        w_z[i] = get<T, W>(at.weight(2, i), t[2].stride[1], at.n[i]);
        w_f[i] = get<T, W>(at.weight(3, i), t[3].stride[1], at.n[i]);
      }
      for (int step = 0; step < time; step++)
        for (int i = 0; i < at.count; i++) {
          if (t[7].address) put<T, W>(at.step(7, step, i), t[7].stride[3], c[i], at.n[i]);
          const V<T, W> z = get<T, W>(at.step(0, step, i), t[0].stride[3], at.n[i]) + w_z[i] * c[i];
          const V<T, W> f = get<T, W>(at.step(1, step, i), t[1].stride[3], at.n[i]) + w_f[i] * c[i];
          c[i] = elementwise_lstm_cell(c[i], hyperbolic<T, W>(z), logistic<T, W>(f));
          put<T, W>(at.step(5, step, i), t[5].stride[3], c[i], at.n[i]);
        }
      for (int i = 0; i < at.count; i++) put<T, W>(at.state(6, i), t[6].stride[2], c[i], at.n[i]);
    });
  }
};

// Tensors: z f w_z w_f c0, final before | dc dfinal | dz df dw_z dw_f dc0
struct Backward : Call {
  template <class T, int W> int run() const {
    return each_tile<T, W>([this](const Channels<T, W>& at) {
      V<T, W> carry[kRegisters], w_z[kRegisters], w_f[kRegisters], dw_z[kRegisters] = {}, dw_f[kRegisters] = {};
      for (int i = 0; i < at.count; i++) {
        carry[i] = get<T, W>(at.state(8, i), t[8].stride[2], at.n[i]);
        w_z[i] = get<T, W>(at.weight(2, i), t[2].stride[1], at.n[i]);
        w_f[i] = get<T, W>(at.weight(3, i), t[3].stride[1], at.n[i]);
      }
      for (int step = time - 1; step >= 0; step--)
        for (int i = 0; i < at.count; i++) {
          const V<T, W> c = get<T, W>(at.step(6, step, i), t[6].stride[3], at.n[i]);
          const V<T, W> z = hyperbolic<T, W>(get<T, W>(at.step(0, step, i), t[0].stride[3], at.n[i]) + w_z[i] * c);
          const V<T, W> f = logistic<T, W>(get<T, W>(at.step(1, step, i), t[1].stride[3], at.n[i]) + w_f[i] * c);
          const V<T, W> g = carry[i] + get<T, W>(at.step(7, step, i), t[7].stride[3], at.n[i]);
          V<T, W> dz, df;
          carry[i] = elementwise_lstm_backward(c, z, f, w_z[i], w_f[i], g, dz, df);
          dw_z[i] += dz * c;
          dw_f[i] += df * c;
          put<T, W>(at.step(9, step, i), t[9].stride[3], dz, at.n[i]);
          put<T, W>(at.step(10, step, i), t[10].stride[3], df, at.n[i]);
        }
      for (int i = 0; i < at.count; i++) {
        put<T, W>(at.state(11, i), t[11].stride[2], dw_z[i], at.n[i]);
        put<T, W>(at.state(12, i), t[12].stride[2], dw_f[i], at.n[i]);
        put<T, W>(at.state(13, i), t[13].stride[2], carry[i], at.n[i]);
      }
    });
  }
};

}  // namespace

NBS_KERNELS(elementwise_lstm)
