// Causal linear attention on the GPU; warps.h says who holds what.
#include "linear_attention.h"
#include "warps.h"

namespace {

// Tensors: q k v state | y final
template <class T, int Rows> __global__ void __launch_bounds__(kColumns * kMaxWarps, 1) forward(const Call call) {
  __shared__ float q[2][kMaxDim], k[2][kMaxDim], parts[2][kMaxWarps][kColumns];
  const Place at(call, Rows);
  const Tensor* t = call.t;
  float state[Rows];
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const int row = at.row + e;
    state[e] = row < call.d_k ? entry(t[3], t[3].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
  }
  for (int step = 0, now = 0; step < call.time; step++, now = 1 - now) {
    stage(q[now], t[0], t[0].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage(k[now], t[1], t[1].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    const float v = entry(t[2], t[2].at<T>(at.b, step, at.h), at.column, at.real);
    float y = 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < Rows; e++) linear_forward_row(state[e], k[now][at.row + e], v, q[now][at.row + e], y);
    y = block_sum(y, parts[now], at);
    if (at.real && at.warp == 0) put(t[4].at<T>(at.b, step, at.h) + at.column * t[4].stride[3], y);
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.row + e < call.d_k && at.real)
      t[5].at<float>(at.b, at.h, at.row + e)[at.column * t[5].stride[3]] = state[e];
}

// Tensors: q k v state final | dy dfinal | dq dk dv dstate; dq and dk of each slab apart
template <class T, int Rows> __global__ void __launch_bounds__(kColumns * kMaxWarps, 1) backward(const Call call) {
  constexpr int Group = Rows < 16 ? Rows : 16;
  __shared__ float q[2][kMaxDim], k[2][kMaxDim], parts[2][kMaxWarps][kColumns];
  const Place at(call, Rows);
  const Tensor* t = call.t;
  float state[Rows], grad[Rows];
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const int row = at.row + e;
    state[e] = row < call.d_k ? entry(t[4], t[4].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
    grad[e] = row < call.d_k ? entry(t[6], t[6].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
  }
  for (int step = call.time - 1, now = 0; step >= 0; step--, now = 1 - now) {
    stage(q[now], t[0], t[0].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage(k[now], t[1], t[1].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    const float v = entry(t[2], t[2].at<T>(at.b, step, at.h), at.column, at.real);
    const float dy = entry(t[5], t[5].at<T>(at.b, step, at.h), at.column, at.real);
    float dv = 0;
    __syncthreads();
#pragma unroll
    for (int group = 0; group < Rows; group += Group) {
      float dq[Group], dk[Group];
#pragma unroll
      for (int i = 0; i < Group; i++) {
        const int e = group + i;
        dq[i] = dk[i] = 0;
        linear_backward_row(state[e], grad[e], k[now][at.row + e], v, q[now][at.row + e], dy, dq[i], dk[i], dv);
      }
      const float dq_sum = row_sums(dq, at.lane), dk_sum = row_sums(dk, at.lane);
      const int row = at.row + group + at.lane / (kColumns / Group);
      if (at.lane % (kColumns / Group) == 0 && row < call.d_k) {
        slab_row(t[7], at, step, call)[row] = dq_sum;
        slab_row(t[8], at, step, call)[row] = dk_sum;
      }
    }
    dv = block_sum(dv, parts[now], at);
    if (at.real && at.warp == 0) put(t[9].at<T>(at.b, step, at.h) + at.column * t[9].stride[3], dv);
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.row + e < call.d_k && at.real && t[10].address)
      t[10].at<float>(at.b, at.h, at.row + e)[at.column * t[10].stride[3]] = grad[e];
}

NBS_LAUNCH(forward)
NBS_LAUNCH(backward)

}  // namespace

NBS_KERNEL(linear_attention_forward_float32, forward, float, 6)
NBS_KERNEL(linear_attention_forward_bfloat16, forward, __nv_bfloat16, 6)
NBS_KERNEL(linear_attention_backward_float32, backward, float, 11)
NBS_KERNEL(linear_attention_backward_bfloat16, backward, __nv_bfloat16, 11)
