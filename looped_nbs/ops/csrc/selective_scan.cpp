// Selective scan on the CPU. A register of channels goes through time with all its states, so that only the gradients of B
// and C are sums over lanes. Backwards, the states of a chunk are computed again from the one that was kept before it.
#include "selective_scan.h"
#include "sweeps.h"

namespace {

enum { kX, kDelta, kA, kB, kC, kD, kZ, kBias, kState, kInputs };

// W channels of one example.
template <class T, int W> struct Channels {
  int64_t b;
  int first, n, states;

  T* step(const Tensor& x, int time) const { return moved(x.at<T>(b, time), first * x.stride[2]); }
  V<T, W> token(const Tensor& x, int time) const { return get<T, W>(step(x, time), x.stride[2], n); }
  void token(const Tensor& x, int time, const V<T, W>& y) const { put<T, W>(step(x, time), x.stride[2], y, n); }
  V<T, W> weight(const Tensor& x) const { return get<T, W>(x.at<T>(first, 0), x.stride[0], n); }
  void weight(const Tensor& x, const V<T, W>& y) const { put<T, W>(x.at<T>(b, first), x.stride[1], y, n); }

  // A register of channels for each state from rows of states at `from`, and back.
  void gather(T* to, const T* from, const int64_t* stride) const {
    if (!from || n < W) std::memset(to, 0, states * W * sizeof(T));
    for (int i = 0; i < n && from; i++)
      for (int s = 0; s < states; s++) to[s * W + i] = from[i * stride[0] + s * stride[1]];
  }
  void scatter(T* to, const int64_t* stride, const T* from) const {
    for (int i = 0; i < n && to; i++)
      for (int s = 0; s < states; s++) to[i * stride[0] + s * stride[1]] = from[s * W + i];
  }
};

struct Pass {
  const Tensor* t;
  int batch, time, channels, states, threads;

  template <class T, class P> static int start(P pass, const Tensor* t, const int64_t* n, int64_t threads) {
    static_cast<Pass&>(pass) = {t, int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(threads)};
    return with_lanes<T>(pass.channels, pass);
  }
  template <class T, int W> Channels<T, W> tile(int64_t b, int i) const {
    return {b, i * W, channels - i * W < W ? channels - i * W : W, states};
  }
  // Ask for a token of some tensors.
  template <class T, int W> void soon(const Channels<T, W>& at, int step) const {
    if (step < 0 || step >= time) return;
    for (int i : {kX, kDelta, kZ}) ahead(at.step(t[i], step), at.n);
  }
};

// Some steps of all states; what they add to the states and how they fade is kept, or only the last state.
template <int Steps, bool Keep, class T, int W>
NBS_SHARED void sweep(int states, int64_t size, const T* A, T* s, T* a, const V<T, W>* all_delta, const V<T, W>* all_drive,
                      const T* B, const T* C, int width, V<T, W>* all_y) {
  V<T, W> delta[Steps], drive[Steps], y[Steps];
  for (int k = 0; k < Steps; k++) delta[k] = all_delta[k], drive[k] = all_drive[k], y[k] = all_y[k];
  for (int j = 0; j < states; j++) {
    const V<T, W> rate = load<T, W>(A + j * W);
    V<T, W> state = load<T, W>(s + j * W);
#pragma GCC unroll 4
    for (int k = 0; k < Steps; k++) {
      const V<T, W> decay = two_to<T, W>(delta[k] * rate);
      selective_scan_forward(state, decay, drive[k], B[k * width + j], C[k * width + j], y[k]);
      if (Keep) store<T, W>(a + k * size + j * W, decay);
      if (Keep) store<T, W>(s + (k + 1) * size + j * W, state);
    }
    if (!Keep) store<T, W>(s + j * W, state);
  }
  for (int k = 0; k < Steps; k++) all_y[k] = y[k];
}

// The steps of a chunk, four at a time.
template <bool Keep, class T, int W>
void sweeps(int count, int states, int64_t size, const T* A, T* s, T* a, const V<T, W>* delta, const V<T, W>* drive,
            const T* B, const T* C, int width, V<T, W>* y) {
  int k = 0;
  const auto some = [&](auto steps) {
    constexpr int n = decltype(steps)::value;
    const int64_t at = Keep ? k * size : 0;
    sweep<n, Keep, T, W>(states, size, A, s + at, a + at, delta + k, drive + k, B + k * width, C + k * width, width, y + k);
    k += n;
  };
  while (k + 4 <= count) some(Size<4>{});
  while (k < count) some(Size<1>{});
}

// Tensors: x delta A B C D z bias state | y final kept
struct Forward : Pass {
  template <class T, int W> int run() const {
    const int tiles = (channels + W - 1) / W;
    const size_t numbers = (2 * W + 2 * kChunk) * size_t(states);
    return each_head<T>(batch, tiles, threads, numbers, [this](int64_t b, int64_t i, T* memory) {
      scan<T, W>(tile<T, W>(b, i), Pieces<T>{memory});
      return 0;
    });
  }

  template <class T, int W> void scan(const Channels<T, W>& at, Pieces<T> piece) const {
    const Tensor &out = t[kInputs], &last = t[kInputs + 1], &kept = t[kInputs + 2];
    T *A = piece(states * W), *s = piece(states * W), *B = piece(kChunk * states), *C = piece(kChunk * states);
    at.gather(A, t[kA].at<T>(at.first, 0), t[kA].stride);
    at.gather(s, t[kState].at<T>(at.b, at.first), t[kState].stride + 1);
    for (int j = 0; j < states * W; j++) A[j] *= T(kLog2E);
    const V<T, W> bias = at.weight(t[kBias]), D = at.weight(t[kD]);
    for (int first = 0; first < time; first += kChunk) {
      const int count = time - first < kChunk ? time - first : kChunk;
      V<T, W> delta[kChunk], drive[kChunk], y[kChunk], slope;
      for (int j = 0; j < states && kept.address; j++)
        put<T, W>(kept.at<T>(at.b, first / kChunk, j) + at.first, 1, load<T, W>(s + j * W), at.n);
      for (int k = 0; k < count; k++) {
        soon(at, first + k + kChunk);
        read(B + k * states, states, t[kB].at<T>(at.b, first + k), t[kB].stride[2], states);
        read(C + k * states, states, t[kC].at<T>(at.b, first + k), t[kC].stride[2], states);
        const V<T, W> x = at.token(t[kX], first + k);
        delta[k] = softplus<T, W>(at.token(t[kDelta], first + k) + bias, slope);
        drive[k] = delta[k] * x;
        y[k] = x * D;
      }
      sweeps<false, T, W>(count, states, 0, A, s, nullptr, delta, drive, B, C, states, y);
      for (int k = 0; k < count; k++) {
        if (t[kZ].address) {
          const V<T, W> z = at.token(t[kZ], first + k);
          y[k] *= z * logistic<T, W>(z);
        }
        at.token(out, first + k, y[k]);
      }
    }
    at.scatter(last.at<T>(at.b, at.first), last.stride + 1, s);
  }
};

// Tensors: x delta A B C D z bias state, final kept | dy dfinal | dx ddelta dA dB dC dD dz dbias dstate
struct Backward : Pass {
  template <class T, int W> int run() const {
    const int tiles = (channels + W - 1) / W, padded = round_up(states, W);
    const size_t numbers = ((4 + 2 * kChunk) * W + 2 * kChunk) * size_t(padded);
    return each_head<T>(batch, 1, threads, numbers, [=](int64_t b, int64_t, T* memory) {
      for (int i = 0; i < tiles; i++) scan<T, W>(tile<T, W>(b, i), padded, Pieces<T>{memory});
      return 0;
    });
  }

  template <class T, int W> void scan(const Channels<T, W>& at, int padded, Pieces<T> piece) const {
    const Tensor *kept = t + kInputs + 1, *dy = t + kInputs + 2, *dlast = dy + 1, *d = dlast + 1;
    const int64_t size = int64_t(padded) * W;
    T *A = piece(size), *dA = piece(size), *carry = piece(size), *a = piece(kChunk * size);
    T *s = piece((kChunk + 1) * size), *B = piece(kChunk * padded), *C = piece(kChunk * padded);
    V<T, W> x[kChunk], delta[kChunk], drive[kChunk], slope[kChunk], y[kChunk], dD = {}, dbias = {};
    at.gather(A, t[kA].at<T>(at.first, 0), t[kA].stride);
    at.gather(carry, dlast->at<T>(at.b, at.first), dlast->stride + 1);
    for (int j = 0; j < states * W; j++) A[j] *= T(kLog2E);
    const V<T, W> bias = at.weight(t[kBias]), D = at.weight(t[kD]);
    for (int chunk = (time - 1) / kChunk; chunk >= 0; chunk--) {
      const int first = chunk * kChunk, count = time - first < kChunk ? time - first : kChunk;
      for (int j = 0; j < states; j++)
        store<T, W>(s + j * W, get<T, W>(kept->at<T>(at.b, chunk, j) + at.first, 1, at.n));
      for (int k = 0; k < count; k++) {
        soon(at, first + k - kChunk);
        if (first) ahead(at.step(*dy, first + k - kChunk), at.n);
        read(B + k * padded, padded, t[kB].at<T>(at.b, first + k), t[kB].stride[2], states);
        read(C + k * padded, padded, t[kC].at<T>(at.b, first + k), t[kC].stride[2], states);
        x[k] = at.token(t[kX], first + k);
        delta[k] = softplus<T, W>(at.token(t[kDelta], first + k) + bias, slope[k]);
        drive[k] = delta[k] * x[k];
        y[k] = x[k] * D;
      }
      sweeps<true, T, W>(count, states, size, A, s, a, delta, drive, B, C, padded, y);
      for (int k = count - 1; k >= 0; k--) {
        V<T, W> g = at.token(*dy, first + k);
        if (t[kZ].address) {
          const V<T, W> z = at.token(t[kZ], first + k), gate = logistic<T, W>(z);
          at.token(d[kZ], first + k, g * y[k] * gate * (1 + z * (1 - gate)));
          g *= z * gate;
        }
        V<T, W> ddrive = {}, ddelta = {};
        for (int group = 0; group < padded; group += W) {
          const auto state = [&](int j, V<T, W>* sums) __attribute__((always_inline)) {
            const T* before = s + k * size + j * W;
            V<T, W> h = load<T, W>(carry + j * W), sum = load<T, W>(dA + j * W);
            selective_scan_backward(h, load<T, W>(a + k * size + j * W), load<T, W>(before), load<T, W>(before + size),
                                    drive[k], delta[k], load<T, W>(A + j * W), B[k * padded + j], C[k * padded + j], g,
                                    ddrive, ddelta, sum, sums[0], sums[1]);
            store<T, W>(carry + j * W, h);
            store<T, W>(dA + j * W, sum);
          };
          V<T, W> sums[2];
          Fold<T, W>::template rows<2>(state, group, sums);
          store<T, W>(B + k * padded + group, sums[0]);  // it has been read
          store<T, W>(C + k * padded + group, sums[1]);
        }
        write(d[kB].at<T>(at.b, first + k), d[kB].stride[2], B + k * padded, states, at.first > 0);
        write(d[kC].at<T>(at.b, first + k), d[kC].stride[2], C + k * padded, states, at.first > 0);
        at.token(d[kX], first + k, g * D + ddrive * delta[k]);
        const V<T, W> change = (ddelta * T(1 / kLog2E) + ddrive * x[k]) * slope[k];
        at.token(d[kDelta], first + k, change);
        dbias += change;
        dD += g * x[k];
      }
    }
    at.scatter(d[kA].at<T>(at.b, at.first), d[kA].stride + 1, dA);
    at.scatter(d[kState].at<T>(at.b, at.first), d[kState].stride + 1, carry);
    at.weight(d[kD], dD);
    at.weight(d[kBias], dbias);
  }
};

}  // namespace

NBS_KERNELS(selective_scan)
