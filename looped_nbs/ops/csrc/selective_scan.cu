// Selective scan on the GPU: each thread holds up to 32 states of one channel, a warp 32 channels, and the warps of a block
// the states of the same channels; selective_scan.cpp says which tensor is which. Tokens are seen as those of one head.
#include "selective_scan.h"
#include "warps.h"

namespace {

constexpr int kWarps = 8;
enum { kX, kDelta, kA, kB, kC, kD, kZ, kBias, kState, kInputs };

// What a thread reads of its channel.
template <class T> struct Channel {
  const Tensor* t;
  const Place& at;

  __device__ float token(const Tensor& x, int step) const { return entry(x, x.at<T>(at.b, step), at.column, at.real); }
  __device__ void token(const Tensor& x, int step, float y) const {
    if (at.real && at.warp == 0 && x.address) put(x.at<T>(at.b, step) + at.column * x.stride[3], y);
  }
  __device__ float weight(const Tensor& x) const {
    return x.address && at.real ? number(x.at<T>(0, 0)[at.column * x.stride[0]]) : 0.f;
  }
  __device__ void weight(const Tensor& x, float y) const {  // a gradient of this example
    if (at.real && at.warp == 0 && x.address) x.at<float>(at.b, at.column)[0] = y;
  }
  template <class U> __device__ float state(const U* row, int64_t stride, int e, const Call& call) const {
    return row && at.real && at.row + e < call.d_k ? number(row[(at.row + e) * stride]) : 0.f;
  }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

template <class T, int Rows> __global__ void __launch_bounds__(Rows < 32 ? kColumns : kColumns * kWarps, 1)
    forward(const Call call) {
  __shared__ float B[2][kMaxDim], C[2][kMaxDim], parts[2][kWarps][kColumns];
  const Place at(call, Rows);
  const Tensor *t = call.t, &kept = t[kInputs + 2];
  const Channel<T> mine{t, at};
  float A[Rows], s[Rows];
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    A[e] = mine.state(at.real ? t[kA].at<T>(at.column, 0) : nullptr, t[kA].stride[1], e, call);
    s[e] = mine.state(at.real ? t[kState].at<float>(at.b, at.column) : nullptr, t[kState].stride[2], e, call);
  }
  const float bias = mine.weight(t[kBias]), D = mine.weight(t[kD]);
  for (int step = 0, now = 0; step < call.time; step++, now = 1 - now) {
    if (kept.address && step % kChunk == 0)
#pragma unroll
      for (int e = 0; e < Rows; e++)
        if (at.real && at.row + e < call.d_k)
          kept.at<float>(at.b, step / kChunk, at.row + e)[at.column * kept.stride[3]] = s[e];
    stage(B[now], t[kB], t[kB].at<T>(at.b, step), call.d_k, at.warps * Rows);
    stage(C[now], t[kC], t[kC].at<T>(at.b, step), call.d_k, at.warps * Rows);
    const float x = mine.token(t[kX], step), delta = softplus(mine.token(t[kDelta], step) + bias);
    float y = 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < Rows; e++)
      selective_scan_forward(s[e], expf(delta * A[e]), delta * x, B[now][at.row + e], C[now][at.row + e], y);
    y = block_sum(y, parts[now], at) + x * D;
    if (t[kZ].address) {
      const float z = mine.token(t[kZ], step);
      y *= z * sigmoid(z);
    }
    mine.token(t[kInputs], step, y);
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.real && at.row + e < call.d_k)
      t[kInputs + 1].at<float>(at.b, at.column)[(at.row + e) * t[kInputs + 1].stride[2]] = s[e];
}

template <class T, int Rows> __global__ void __launch_bounds__(Rows < 32 ? kColumns : kColumns * kWarps, 1)
    backward(const Call call) {
  constexpr int Group = Rows < 16 ? Rows : 16;
  __shared__ float B[2][kMaxDim], C[2][kMaxDim], parts[2][2][kWarps][kColumns];
  const Place at(call, Rows);
  const Tensor *t = call.t, &kept = t[kInputs + 1], &dy = t[kInputs + 2], &dlast = t[kInputs + 3], *d = t + kInputs + 4;
  const Channel<T> mine{t, at};
  float A[Rows], dA[Rows], carry[Rows], s[kChunk + 1][Rows], y[kChunk], dD = 0, dbias = 0;
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    A[e] = mine.state(at.real ? t[kA].at<T>(at.column, 0) : nullptr, t[kA].stride[1], e, call);
    carry[e] = mine.state(at.real ? dlast.at<float>(at.b, at.column) : nullptr, dlast.stride[2], e, call);
    dA[e] = 0;
  }
  const float bias = mine.weight(t[kBias]), D = mine.weight(t[kD]);
  int now = 0;
  for (int first = (call.time - 1) / kChunk * kChunk; first >= 0; first -= kChunk) {
    const int count = call.time - first < kChunk ? call.time - first : kChunk;
#pragma unroll
    for (int e = 0; e < Rows; e++)
      s[0][e] = at.real && at.row + e < call.d_k
                    ? kept.at<float>(at.b, first / kChunk, at.row + e)[at.column * kept.stride[3]] : 0.f;
    for (int k = 0; k < count; k++, now = 1 - now) {
      stage(B[now], t[kB], t[kB].at<T>(at.b, first + k), call.d_k, at.warps * Rows);
      stage(C[now], t[kC], t[kC].at<T>(at.b, first + k), call.d_k, at.warps * Rows);
      const float x = mine.token(t[kX], first + k), delta = softplus(mine.token(t[kDelta], first + k) + bias);
      float total = 0;
      __syncthreads();
#pragma unroll
      for (int e = 0; e < Rows; e++) {
        float state = s[k][e];
        selective_scan_forward(state, expf(delta * A[e]), delta * x, B[now][at.row + e], C[now][at.row + e], total);
        s[k + 1][e] = state;
      }
      y[k] = block_sum(total, parts[0][now], at) + x * D;
    }
    for (int k = count - 1; k >= 0; k--, now = 1 - now) {
      const int step = first + k;
      stage(B[now], t[kB], t[kB].at<T>(at.b, step), call.d_k, at.warps * Rows);
      stage(C[now], t[kC], t[kC].at<T>(at.b, step), call.d_k, at.warps * Rows);
      const float x = mine.token(t[kX], step), before = mine.token(t[kDelta], step) + bias, delta = softplus(before);
      float g = mine.token(dy, step), ddrive = 0, ddelta = 0;
      if (t[kZ].address) {
        const float z = mine.token(t[kZ], step), gate = sigmoid(z);
        mine.token(d[kZ], step, g * y[k] * gate * (1 + z * (1 - gate)));
        g *= z * gate;
      }
      __syncthreads();
#pragma unroll
      for (int group = 0; group < Rows; group += Group) {
        float db[Group], dc[Group];
#pragma unroll
        for (int i = 0; i < Group; i++) {
          const int e = group + i;
          selective_scan_backward(carry[e], expf(delta * A[e]), s[k][e], s[k + 1][e], delta * x, delta, A[e],
                                  B[now][at.row + e], C[now][at.row + e], g, ddrive, ddelta, dA[e], db[i], dc[i]);
        }
        const float db_sum = row_sums(db, at.lane), dc_sum = row_sums(dc, at.lane);
        const int row = at.row + group + at.lane / (kColumns / Group);
        if (at.lane % (kColumns / Group) == 0 && row < call.d_k) {
          slab_row(d[kB], at, step, call)[row] = db_sum;
          slab_row(d[kC], at, step, call)[row] = dc_sum;
        }
      }
      ddrive = block_sum(ddrive, parts[0][now], at);
      ddelta = block_sum(ddelta, parts[1][now], at) + ddrive * x;
      ddelta *= sigmoid(before);
      mine.token(d[kX], step, g * D + ddrive * delta);
      mine.token(d[kDelta], step, ddelta);
      dbias += ddelta;
      dD += g * x;
    }
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.real && at.row + e < call.d_k) {
      d[kA].at<float>(at.b, at.column)[(at.row + e) * d[kA].stride[2]] = dA[e];
      if (d[kState].address) d[kState].at<float>(at.b, at.column)[(at.row + e) * d[kState].stride[2]] = carry[e];
    }
  mine.weight(d[kD], dD);
  mine.weight(d[kBias], dbias);
}

// Start a pass: so many tensors, of which those at `tokens` are (batch, time, n).
template <template <class, int> class Kernel, class T, int n>
int start(const Tensor* tensors, int count, const int (&tokens)[n], const int64_t* sizes, int64_t stream) {
  Call call = {{}, int(sizes[0]), int(sizes[1]), 1, int(sizes[3]), int(sizes[2])};
  for (int i = 0; i < count; i++) call.t[i] = tensors[i];
  for (int i : tokens) call.t[i].stride[3] = call.t[i].stride[2];
  const dim3 grid(call.batch, (call.d_v + kColumns - 1) / kColumns);
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  if (!grid.x || !grid.y) return 0;
  if (call.d_k <= 8) Kernel<T, 8>::launch(grid, 1, s, call);
  else if (call.d_k <= 16) Kernel<T, 16>::launch(grid, 1, s, call);
  else Kernel<T, 32>::launch(grid, (call.d_k + 31) / 32, s, call);
  return -int(cudaGetLastError());
}

NBS_LAUNCH(forward)
NBS_LAUNCH(backward)

constexpr int kForward[] = {kX, kDelta, kB, kC, kZ, kInputs};
constexpr int kBackward[] = {kX, kDelta, kB, kC, kZ, kInputs + 2, kInputs + 4 + kX, kInputs + 4 + kDelta, kInputs + 4 + kZ};

}  // namespace

#define NBS_SCAN(pass, type, name, count, tokens) \
  NBS_EXPORT int selective_scan_##pass##_##name(const Tensor* tensors, const int64_t* sizes, int64_t stream) { \
    return start<pass##Launch, type>(tensors, count, tokens, sizes, stream); \
  }
NBS_SCAN(forward, float, float32, kInputs + 3, kForward)
NBS_SCAN(forward, __nv_bfloat16, bfloat16, kInputs + 3, kForward)
NBS_SCAN(backward, float, float32, 2 * kInputs + 4, kBackward)
NBS_SCAN(backward, __nv_bfloat16, bfloat16, 2 * kInputs + 4, kBackward)
