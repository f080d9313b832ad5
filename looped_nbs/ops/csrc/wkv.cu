// WKV on the GPU; warps.h says who holds what, wkv.cpp which tensor is which. The gradients of all that belongs to keys are
// sums over columns, so each slab of columns has its own share of them.
#include "warps.h"
#include "wkv.h"

namespace {

enum { kR, kK, kV, kW, kU, kState, kInputs };

// The factors by which rows fade, over the block.
template <class T> __device__ void stage_fading(float* to, const Tensor& t, const T* row, int n, int padded) {
  for (int i = threadIdx.y * kColumns + threadIdx.x; i < padded; i += blockDim.y * kColumns)
    to[i] = i < n ? expf(-expf(number(row[i * t.stride[3]]))) : 1.f;
}

template <class T, int Rows> __global__ void __launch_bounds__(kColumns * kMaxWarps, 1) forward(const Call call) {
  __shared__ float r[2][kMaxDim], k[2][kMaxDim], w[2][kMaxDim], u[kMaxDim], parts[2][kMaxWarps][kColumns];
  const Place at(call, Rows);
  const Tensor* t = call.t;
  float state[Rows];
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const int row = at.row + e;
    state[e] = row < call.d_k ? entry(t[kState], t[kState].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
  }
  Tensor weights = t[kU];
  weights.stride[3] = weights.stride[1];
  stage(u, weights, weights.at<T>(at.h, 0), call.d_k, at.warps * Rows);
  for (int step = 0, now = 0; step < call.time; step++, now = 1 - now) {
    stage(r[now], t[kR], t[kR].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage(k[now], t[kK], t[kK].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage_fading(w[now], t[kW], t[kW].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    const float v = entry(t[kV], t[kV].at<T>(at.b, step, at.h), at.column, at.real);
    float y = 0, bonus = 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < Rows; e++) {
      const int row = at.row + e;
      wkv_forward_row(state[e], w[now][row], k[now][row], v, r[now][row], y);
      bonus += r[now][row] * u[row] * k[now][row];
    }
    y = block_sum(y + bonus * v, parts[now], at);
    if (at.real && at.warp == 0) put(t[kInputs].at<T>(at.b, step, at.h) + at.column * t[kInputs].stride[3], y);
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.row + e < call.d_k && at.real)
      t[kInputs + 1].at<float>(at.b, at.h, at.row + e)[at.column * t[kInputs + 1].stride[3]] = state[e];
}

// dr dk dw of each slab apart, and du of each slab and example
template <class T, int Rows> __global__ void __launch_bounds__(kColumns * kMaxWarps, 1) backward(const Call call) {
  constexpr int Group = Rows < 16 ? Rows : 16, Width = kColumns / Group;
  __shared__ float r[2][kMaxDim], k[2][kMaxDim], w[2][kMaxDim], u[kMaxDim], parts[2][kMaxWarps][kColumns];
  const Place at(call, Rows);
  const Tensor *t = call.t, &dy = t[kInputs + 1], &dlast = t[kInputs + 2], *d = t + kInputs + 3;
  const bool owner = at.lane % Width == 0;
  float state[Rows], product[Rows / Group], du[Rows / Group];
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const int row = at.row + e;
    state[e] = row < call.d_k ? entry(t[kState], t[kState].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
  }
  Tensor weights = t[kU];
  weights.stride[3] = weights.stride[1];
  stage(u, weights, weights.at<T>(at.h, 0), call.d_k, at.warps * Rows);
  int now = 0;
  for (int step = 0; step < call.time; step++, now = 1 - now) {
    stage(k[now], t[kK], t[kK].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage_fading(w[now], t[kW], t[kW].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    const float v = entry(t[kV], t[kV].at<T>(at.b, step, at.h), at.column, at.real);
    const float g = entry(dy, dy.at<T>(at.b, step, at.h), at.column, at.real);
    __syncthreads();
#pragma unroll
    for (int group = 0; group < Rows; group += Group) {
      float dr[Group];
#pragma unroll
      for (int i = 0; i < Group; i++) {
        dr[i] = 0;
        wkv_again_row(state[group + i], w[now][at.row + group + i], k[now][at.row + group + i], v, g, dr[i]);
      }
      const float sum = row_sums(dr, at.lane);
      const int row = at.row + group + at.lane / Width;
      if (owner && row < call.d_k) slab_row(d[kR], at, step, call)[row] = sum;
    }
  }
#pragma unroll
  for (int group = 0; group < Rows; group += Group) {
    float x[Group];
#pragma unroll
    for (int i = 0; i < Group; i++) {
      const int e = group + i, row = at.row + e;
      const float grad = row < call.d_k ? entry(dlast, dlast.at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
      x[i] = state[e] * grad;
      state[e] = grad;
    }
    product[group / Group] = row_sums(x, at.lane);
    du[group / Group] = 0;
  }
  for (int step = call.time - 1; step >= 0; step--, now = 1 - now) {
    stage(r[now], t[kR], t[kR].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage(k[now], t[kK], t[kK].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage_fading(w[now], t[kW], t[kW].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    const float v = entry(t[kV], t[kV].at<T>(at.b, step, at.h), at.column, at.real);
    const float g = entry(dy, dy.at<T>(at.b, step, at.h), at.column, at.real);
    const float bonus = warp_sum(v * g);
    float dv = 0, share = 0;
    __syncthreads();
#pragma unroll
    for (int group = 0; group < Rows; group += Group) {
      float dk[Group];
#pragma unroll
      for (int i = 0; i < Group; i++) {
        const int e = group + i, row = at.row + e;
        dk[i] = 0;
        wkv_backward_row(state[e], w[now][row], k[now][row], v, r[now][row], g, dk[i], dv);
        share += r[now][row] * u[row] * k[now][row];
      }
      float dk_sum = row_sums(dk, at.lane), dw;
      const int row = at.row + group + at.lane / Width;
      if (owner && row < call.d_k) {
        float* dr = slab_row(d[kR], at, step, call) + row;  // this thread wrote it
        const float rate = expf(number(t[kW].at<T>(at.b, step, at.h)[row * t[kW].stride[3]]));
        wkv_keys(product[group / Group], rate, 16.f, r[now][row], k[now][row], u[row], bonus, *dr, dk_sum, dw,
                 du[group / Group]);
        slab_row(d[kK], at, step, call)[row] = dk_sum;
        slab_row(d[kW], at, step, call)[row] = dw;
      }
    }
    dv = block_sum(dv + share * g, parts[now], at);
    if (at.real && at.warp == 0) put(d[kV].at<T>(at.b, step, at.h) + at.column * d[kV].stride[3], dv);
  }
#pragma unroll
  for (int group = 0; group < Rows; group += Group) {
    const int row = at.row + group + at.lane / Width;
    if (owner && row < call.d_k) d[kU].at<float>(at.slab, at.b, at.h)[row] = du[group / Group];
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.row + e < call.d_k && at.real && d[kState].address)
      d[kState].at<float>(at.b, at.h, at.row + e)[at.column * d[kState].stride[3]] = state[e];
}

NBS_LAUNCH(forward)
NBS_LAUNCH(backward)

}  // namespace

NBS_KERNEL(wkv_forward_float32, forward, float, 8)
NBS_KERNEL(wkv_forward_bfloat16, forward, __nv_bfloat16, 8)
NBS_KERNEL(wkv_backward_float32, backward, float, 15)
NBS_KERNEL(wkv_backward_bfloat16, backward, __nv_bfloat16, 15)
