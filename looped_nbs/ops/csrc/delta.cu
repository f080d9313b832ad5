// The delta rule on the GPU; warps.h says who holds what.
#include "delta.h"
#include "warps.h"

namespace {

// Tensors: q k v beta state | y final error
template <class T, int Rows> __global__ void __launch_bounds__(kColumns * kMaxWarps, 1) forward(const Call call) {
  __shared__ float q[2][kMaxDim], k[2][kMaxDim], parts[2][2][kMaxWarps][kColumns];
  const Place at(call, Rows);
  const Tensor* t = call.t;
  float state[Rows];
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const int row = at.row + e;
    state[e] = row < call.d_k ? entry(t[4], t[4].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
  }
  for (int step = 0, now = 0; step < call.time; step++, now = 1 - now) {
    stage(q[now], t[0], t[0].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    stage(k[now], t[1], t[1].at<T>(at.b, step, at.h), call.d_k, at.warps * Rows);
    const float v = entry(t[2], t[2].at<T>(at.b, step, at.h), at.column, at.real);
    const float beta = number(*t[3].at<T>(at.b, step, at.h));
    float old = 0, y = 0, qk = 0, error, write;
    __syncthreads();
    for (int e = at.lane; e < at.warps * Rows; e += kColumns) qk += q[now][e] * k[now][e];
    qk = warp_sum(qk);
#pragma unroll
    for (int e = 0; e < Rows; e++) delta_read_row(state[e], k[now][at.row + e], q[now][at.row + e], old, y);
    old = block_sum(old, parts[now][0], at);
    y = block_sum(y, parts[now][1], at);
    delta_finish(v, old, beta, qk, error, write, y);
#pragma unroll
    for (int e = 0; e < Rows; e++) delta_write_row(state[e], k[now][at.row + e], write);
    if (!at.real || at.warp) continue;
    put(t[5].at<T>(at.b, step, at.h) + at.column * t[5].stride[3], y);
    if (t[7].address) t[7].at<float>(at.b, step, at.h)[at.column * t[7].stride[3]] = error;
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.row + e < call.d_k && at.real)
      t[6].at<float>(at.b, at.h, at.row + e)[at.column * t[6].stride[3]] = state[e];
}

// Tensors: q k v beta state final error | dy dfinal | dq dk dv dbeta dstate; dq, dk and dbeta of each slab apart.
// A sweep ends step t + 1 and begins step t, as on the CPU.
template <class T, int Rows> __global__ void __launch_bounds__(kColumns * kMaxWarps, 1) backward(const Call call) {
  constexpr int Group = Rows < 16 ? Rows : 16, Width = kColumns / Group;
  __shared__ float q[2][kMaxDim], k[3][kMaxDim], parts[2][kMaxWarps][kColumns];
  const Place at(call, Rows);
  const Tensor* t = call.t;
  float state[Rows], grad[Rows], write = 0, r = 0;
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const int row = at.row + e;
    state[e] = row < call.d_k ? entry(t[5], t[5].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
    grad[e] = row < call.d_k ? entry(t[8], t[8].at<float>(at.b, at.h, row), at.column, at.real) : 0.f;
  }
  int now = 0, next = 2;  // buffers of this step's key and of that of the step after it
  stage<T>(k[next], t[1], nullptr, 0, at.warps * Rows);
  for (int step = call.time - 1; step >= -1; step--) {
    const bool real = step >= 0;
    float* q_now = q[step & 1];
    stage(q_now, t[0], real ? t[0].at<T>(at.b, step, at.h) : nullptr, call.d_k, at.warps * Rows);
    stage(k[now], t[1], real ? t[1].at<T>(at.b, step, at.h) : nullptr, call.d_k, at.warps * Rows);
    const float dy = entry(t[7], real ? t[7].at<T>(at.b, step, at.h) : nullptr, at.column, at.real);
    float a = 0;
    __syncthreads();
#pragma unroll
    for (int group = 0; group < Rows; group += Group) {
      float dk[Group], dq[Group];
#pragma unroll
      for (int i = 0; i < Group; i++) {
        const int e = group + i, row = at.row + e;
        dk[i] = dq[i] = 0;
        delta_backward_row(state[e], grad[e], k[next][row], write, r, k[now][row], q_now[row], dy, dk[i], dq[i], a);
      }
      const float dk_sum = row_sums(dk, at.lane), dq_sum = row_sums(dq, at.lane);
      const int row = at.row + group + at.lane / Width;
      const bool mine = at.lane % Width == 0 && row < call.d_k;
      if (mine && step + 1 < call.time) slab_row(t[10], at, step + 1, call)[row] = dk_sum;
      if (mine && real) slab_row(t[9], at, step, call)[row] = dq_sum;
    }
    if (!real) break;
    a = block_sum(a, parts[step & 1], at);
    const float beta = number(*t[3].at<T>(at.b, step, at.h));
    const float error = entry(t[6], t[6].at<float>(at.b, step, at.h), at.column, at.real);
    float dv;
    write = beta * error;
    delta_backward_finish(a, beta, dv, r);
    const float dbeta = warp_sum(a * error);
    if (at.warp == 0) {
      if (at.real) put(t[11].at<T>(at.b, step, at.h) + at.column * t[11].stride[3], dv);
      const int64_t row = ((int64_t(at.slab) * call.batch + at.b) * call.time + step) * call.heads + at.h;
      if (at.lane == 0) reinterpret_cast<float*>(t[12].address)[row] = dbeta;
    }
    next = now;
    now = now == 2 ? 0 : now + 1;
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (at.row + e < call.d_k && at.real && t[13].address)
      t[13].at<float>(at.b, at.h, at.row + e)[at.column * t[13].stride[3]] = grad[e];
}

NBS_LAUNCH(forward)
NBS_LAUNCH(backward)

}  // namespace

NBS_KERNEL(delta_forward_float32, forward, float, 8)
NBS_KERNEL(delta_forward_bfloat16, forward, __nv_bfloat16, 8)
NBS_KERNEL(delta_backward_float32, backward, float, 14)
NBS_KERNEL(delta_backward_bfloat16, backward, __nv_bfloat16, 14)
