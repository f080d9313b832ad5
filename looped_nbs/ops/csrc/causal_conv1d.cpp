// Causal depthwise convolution on the CPU. A register of channels goes through time with the last inputs in a ring.
#include "causal_conv1d.h"
#include "sweeps.h"

namespace {

enum { kX, kWeight, kBias, kState, kInputs };

struct Pass {
  const Tensor* t;
  int batch, time, channels, width, before, silu, threads;

  template <class T, class P> static int start(P pass, const Tensor* t, const int64_t* n, int64_t threads) {
    static_cast<Pass&>(pass) = {t, int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(n[4]), int(n[5]), int(threads)};
    return with_lanes<T>(pass.channels, pass);
  }

  // Call f(example, first channel, number of channels, memory) for each register of channels.
  template <class T, int W, class F> int each_tile(size_t registers, const F& f) const {
    const int tiles = (channels + W - 1) / W;
    return each_head<T>(batch, tiles, threads, registers * W, [=](int64_t b, int64_t i, T* memory) {
      const int first = i * W;
      f(b, first, channels - first < W ? channels - first : W, Pieces<T>{memory});
      return 0;
    });
  }

  // Input at a step, of the state where that is negative.
  template <class T, int W> V<T, W> input(int64_t b, int step, int first, int n) const {
    const Tensor& from = step < 0 ? t[kState] : t[kX];
    const T* row = from.at<T>(b, step < 0 ? before + step : step);
    return get<T, W>(moved(row, first * from.stride[2]), from.stride[2], n);
  }
  template <class T, int W> void weights(T* to, int first, int n) const {
    for (int j = 0; j < width; j++) store<T, W>(to + j * W, get<T, W>(t[kWeight].at<T>(first, j), t[kWeight].stride[0], n));
  }
  template <class T, int W> V<T, W> bias(int first, int n) const {
    return get<T, W>(t[kBias].at<T>(first, 0), t[kBias].stride[0], n);
  }
};

// Tensors: x weight bias state | y final
struct Forward : Pass {
  template <class T, int W> int run() const {
    return each_tile<T, W>(2 * width, [this](int64_t b, int first, int n, Pieces<T> piece) {
      T *weight = piece(width * W), *last = piece(width * W);  // input of step s at s mod width
      const Tensor &y = t[kInputs], &final = t[kInputs + 1];
      weights<T, W>(weight, first, n);
      const V<T, W> start = bias<T, W>(first, n);
      int place = 0;
      const auto keep = [&](int step) {
        store<T, W>(last + place * W, input<T, W>(b, step, first, n));
        place = place + 1 == width ? 0 : place + 1;
      };
      for (int step = -before; step < 0; step++) keep(step);
      for (int step = 0; step < time; step++) {
        keep(step);
        V<T, W> sum = start;
        for (int j = 0, at = place; j < width; j++, at = at + 1 == width ? 0 : at + 1)
          causal_conv1d_forward(sum, load<T, W>(weight + j * W), load<T, W>(last + at * W));
        if (silu) sum *= logistic<T, W>(sum);
        put<T, W>(moved(y.at<T>(b, step), first * y.stride[2]), y.stride[2], sum, n);
      }
      for (int i = 0; i < before; i++)
        put<T, W>(moved(final.at<T>(b, i), first * final.stride[2]), final.stride[2],
                  input<T, W>(b, time - before + i, first, n), n);
    });
  }
};

// Tensors: x weight bias state, final | dy dfinal | dx dweight dbias dstate
struct Backward : Pass {
  template <class T, int W> int run() const {
    return each_tile<T, W>(4 * width, [this](int64_t b, int first, int n, Pieces<T> piece) {
      T *weight = piece(width * W), *dweight = piece(width * W), *last = piece(width * W), *dx = piece(width * W);
      const Tensor *dy = t + kInputs + 1, *dfinal = dy + 1, *d = dfinal + 1;
      const auto row = [&](const Tensor& x, int i) { return moved(x.at<T>(b, i), first * x.stride[2]); };
      weights<T, W>(weight, first, n);
      V<T, W> dbias = {};
      const V<T, W> start = bias<T, W>(first, n);
      // Sums of dx wait in a ring until nothing more is added; the gradient of the last inputs begins them.
      const auto finish = [&](int step, int at) {
        const Tensor& to = step < 0 ? d[kState] : d[kX];
        V<T, W> sum = load<T, W>(dx + at * W);
        if (step >= time - before)
          sum += get<T, W>(row(*dfinal, step - (time - before)), dfinal->stride[2], n);
        put<T, W>(row(to, step < 0 ? before + step : step), to.stride[2], sum, n);
        store<T, W>(dx + at * W, V<T, W>{});
      };
      const auto ring = [&](int step) { return (step % width + width) % width; };
      for (int step = -before; step < 0; step++) store<T, W>(last + ring(step) * W, input<T, W>(b, step, first, n));
      for (int step = 0; step < time; step++) {
        const int now = ring(step);
        store<T, W>(last + now * W, input<T, W>(b, step, first, n));
        V<T, W> g = get<T, W>(row(*dy, step), dy->stride[2], n);
        if (silu) {
          V<T, W> sum = start;
          for (int j = 0, at = now; j < width; j++) {
            at = at + 1 == width ? 0 : at + 1;
            causal_conv1d_forward(sum, load<T, W>(weight + j * W), load<T, W>(last + at * W));
          }
          g *= silu_slope(sum, logistic<T, W>(sum));
        }
        dbias += g;
        for (int j = 0, at = now; j < width; j++) {
          at = at + 1 == width ? 0 : at + 1;
          V<T, W> to = load<T, W>(dx + at * W), to_weight = load<T, W>(dweight + j * W);
          causal_conv1d_backward(g, load<T, W>(weight + j * W), load<T, W>(last + at * W), to, to_weight);
          store<T, W>(dx + at * W, to);
          store<T, W>(dweight + j * W, to_weight);
        }
        finish(step - before, ring(step - before));
      }
      for (int step = time - before; step < time; step++) finish(step, ring(step));
      for (int j = 0; j < width; j++)
        put<T, W>(d[kWeight].at<T>(b, first, j), d[kWeight].stride[1], load<T, W>(dweight + j * W), n);
      put<T, W>(d[kBias].at<T>(b, first), d[kBias].stride[1], dbias, n);
    });
  }
};

}  // namespace

NBS_KERNELS(causal_conv1d)
