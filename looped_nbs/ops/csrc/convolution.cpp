// Causal convolution with a kernel as long as the sequence, on the CPU, by its definition: for short sequences faster than
// any transform. A register of channels is convolved in blocks of eight inputs with eight outputs.
#include "convolution.h"
#include "sweeps.h"

namespace {

constexpr int kBlock = 8;

struct Pass {
  const Tensor* t;
  int batch, time, channels, threads;

  template <class T, class P> static int start(P pass, const Tensor* t, const int64_t* n, int64_t threads) {
    static_cast<Pass&>(pass) = {t, int(n[0]), int(n[1]), int(n[2]), int(threads)};
    return with_lanes<T>(pass.channels, pass);
  }
  int rows() const { return round_up(time, kBlock) + kBlock; }  // of a buffer: a block of zeros first

  // W channels of all steps, behind a block of zeros, last step first if so wanted.
  template <class T, int W> void gather(T* to, const T* row, const int64_t* stride, int first, bool reverse) const {
    const int n = channels - first < W ? channels - first : W;
    for (int s = 0; s < time; s++)
      store<T, W>(to + (kBlock + (reverse ? time - 1 - s : s)) * W, get<T, W>(moved(row, s * stride[0] + first * stride[1]), stride[1], n));
  }

  // y_t += sum of x_s k_(t - s), all behind a block of zeros.
  template <class T, int W> void convolve(T* y, const T* x, const T* k) const {
    for (int to = 0; to < time; to += kBlock) {
      V<T, W> sum[kBlock];
      load_tile<T, W, kBlock>(sum, y + (kBlock + to) * W);
      for (int from = 0; from <= to; from += kBlock) {
        const T *inputs = x + (kBlock + from) * W, *kernel = k + (kBlock + to - from) * W;
#pragma GCC unroll 8
        for (int i = 0; i < kBlock; i++) {
          const V<T, W> input = load<T, W>(inputs + i * W);
#pragma GCC unroll 8
          for (int j = 0; j < kBlock; j++) convolution_add(sum[j], input, load<T, W>(kernel + (j - i) * W));
        }
      }
      store_tile<T, W, kBlock>(y + (kBlock + to) * W, sum);
    }
  }

  template <class T, int W> void scatter(T* row, const int64_t* stride, int first, const T* from, bool reverse) const {
    const int n = channels - first < W ? channels - first : W;
    for (int s = 0; s < time && row; s++)
      put<T, W>(moved(row, s * stride[0] + first * stride[1]), stride[1],
                load<T, W>(from + (kBlock + (reverse ? time - 1 - s : s)) * W), n);
  }
};

// Tensors: x kernel | y
struct Forward : Pass {
  template <class T, int W> int run() const {
    const int64_t size = int64_t(rows()) * W;
    return each_head<T>(batch, (channels + W - 1) / W, threads, 3 * size, [=](int64_t b, int64_t i, T* memory) {
      Pieces<T> piece{memory};
      T *x = piece(size), *k = piece(size), *y = piece(size);
      gather<T, W>(x, t[0].at<T>(b, 0), t[0].stride + 1, i * W, false);
      gather<T, W>(k, t[1].at<T>(0, 0), t[1].stride, i * W, false);
      convolve<T, W>(y, x, k);
      scatter<T, W>(t[2].at<T>(b, 0), t[2].stride + 1, i * W, y, false);
      return 0;
    });
  }
};

// Tensors: x kernel | dy | dx dkernel. With time reversed, dx is dy convolved with the kernel, and dkernel is x convolved with
// the reversed dy.
struct Backward : Pass {
  template <class T, int W> int run() const {
    const int64_t size = int64_t(rows()) * W;
    return each_head<T>(1, (channels + W - 1) / W, threads, 5 * size, [=](int64_t, int64_t i, T* memory) {
      Pieces<T> piece{memory};
      T *x = piece(size), *k = piece(size), *g = piece(size), *dk = piece(size), *dx = piece(size);
      gather<T, W>(k, t[1].at<T>(0, 0), t[1].stride, i * W, false);
      for (int64_t b = 0; b < batch; b++) {
        gather<T, W>(x, t[0].at<T>(b, 0), t[0].stride + 1, i * W, false);
        gather<T, W>(g, t[2].at<T>(b, 0), t[2].stride + 1, i * W, true);
        std::memset(dx, 0, size * sizeof(T));
        convolve<T, W>(dx, g, k);
        convolve<T, W>(dk, x, g);
        scatter<T, W>(t[3].at<T>(b, 0), t[3].stride + 1, i * W, dx, true);
      }
      scatter<T, W>(t[4].at<T>(0, 0), t[4].stride, i * W, dk, true);
      return 0;
    });
  }
};

}  // namespace

NBS_KERNELS(convolution)
