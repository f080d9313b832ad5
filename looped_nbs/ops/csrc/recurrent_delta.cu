// The recurrent delta rule on the GPU; heads.h says who holds what, recurrent_delta.cpp which tensor is which.
#include "heads.h"
#include "recurrent_delta.h"

namespace {

// Thread e or m has the entry e or m of every vector, and column m of the memory.
template <class T, int Rows> __global__ void __launch_bounds__(Rows < 32 ? 32 : Rows) forward(const HeadCall call) {
  __shared__ float s[Rows], q[Rows], k[2][Rows], weights[Rows], rate[1];
  const Seat at(call);
  const Tensor* t = call.t;
  const int m = at.column, dim = call.dim;
  const bool real = m < dim;
  float state[Rows], u = 0;
#pragma unroll
  for (int e = 0; e < Rows; e++)
    state[e] = e < dim ? entry(t[8], t[8].at<float>(at.b, at.h, e), m, real) : 0.f;
  const float* last = t[9].at<float>(at.b, at.h);
  float y = last && real ? last[m * t[9].stride[2]] : 0.f;
  const float r = real ? number(t[7].at<T>(at.h, 0)[m * t[7].stride[1]]) : 0.f;
  clear(s, Rows, at);
  clear(q, Rows, at);
  clear(k[0], 2 * Rows, at);
  clear(weights, Rows, at);
  __syncthreads();
  if (real) weights[m] = r;
  for (int step = 0, now = 0; step < call.time; step++, now = 1 - now) {
    if (m < Rows) s[m] = real ? tanhf(y) : 0.f;
    __syncthreads();
    const float own = m < Rows ? s[m] : 0.f;
    float z[3];
    for (int i = 0; i < 3; i++) {
      z[i] = entry(t[i], t[i].at<T>(at.b, step, at.h), m, real);
      const T* R = t[4 + i].at<T>(at.h, 0);
      for (int e = 0; e < dim && real; e++) z[i] += s[e] * number(R[e * t[4 + i].stride[1] + m * t[4 + i].stride[2]]);
    }
    if (m < Rows) q[m] = real ? z[0] : 0.f, k[now][m] = real ? z[1] : 0.f;
    const float both_rates = warp_dot(weights, s, Rows, at.lane);
    if (!m) rate[0] = logistic(number(*t[3].at<T>(at.b, step, at.h)) + both_rates);
    __syncthreads();
    if (at.warp == 0) warp_softmax(q, dim, at.lane);
    if (at.warp == (at.warps > 1)) warp_softmax(k[now], dim, at.lane);
    __syncthreads();
    float found = 0;
    y = 0;
#pragma unroll
    for (int e = 0; e < Rows; e++) recurrent_delta_forward_row(state[e], k[1 - now][e], u, k[now][e], q[e], found, y);
    const float both = warp_dot(q, k[now], Rows, at.lane), difference = z[2] - found;
    u = rate[0] * difference;
    y += both * u;
    if (real) {
      put(t[10].at<T>(at.b, step, at.h) + m * t[10].stride[3], y);
      if (t[13].address) {
        const float kept[] = {q[m], k[now][m], difference, rate[0], own};
        for (int i = 0; i < 5; i++)
          if (i != 3 || !m) t[13 + i].at<float>(at.b, step, at.h)[i == 3 ? 0 : m * t[13 + i].stride[3]] = kept[i];
      }
    }
  }
  const int now = 1 - call.time % 2;  // the key of the last step
  if (real) t[12].at<float>(at.b, at.h)[m * t[12].stride[2]] = y;
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (e < dim && real) t[11].at<float>(at.b, at.h, e)[m * t[11].stride[3]] = state[e] + k[now][e] * u;
}

template <class T, int Rows> __global__ void __launch_bounds__(Rows < 32 ? 32 : Rows) backward(const HeadCall call) {
  constexpr int Warps = Rows < 32 ? 1 : Rows / 32;
  __shared__ float q[Rows], k[Rows], s[Rows], dq[Rows], dk[Rows], dv[Rows], ds[Rows], parts[Warps][Rows], total[Warps];
  const Seat at(call);
  const Tensor* t = call.t;
  const int m = at.column, dim = call.dim;
  const bool real = m < dim;
  float state[Rows], grad[Rows], dR[3][Rows], dr = 0;
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    state[e] = e < dim ? entry(t[10], t[10].at<float>(at.b, at.h, e), m, real) : 0.f;
    grad[e] = e < dim ? entry(t[18], t[18].at<float>(at.b, at.h, e), m, real) : 0.f;
    for (int i = 0; i < 3; i++) dR[i][e] = 0;
  }
  const float r = real ? number(t[7].at<T>(at.h, 0)[m * t[7].stride[1]]) : 0.f;
  const float* dlast = t[19].at<float>(at.b, at.h);
  float dy = dlast && real ? dlast[m * t[19].stride[2]] : 0.f;
  clear(q, Rows, at);
  clear(k, Rows, at);
  clear(s, Rows, at);
  for (int step = call.time - 1; step >= 0; step--) {
    const auto kept = [&](int i) { return entry(t[i], t[i].at<float>(at.b, step, at.h), m, real); };
    __syncthreads();
    if (m < Rows) q[m] = kept(12), k[m] = kept(13), s[m] = kept(16);
    const float difference = kept(14), rate = *t[15].at<float>(at.b, step, at.h), u = rate * difference;
    dy += entry(t[17], t[17].at<T>(at.b, step, at.h), m, real);
    __syncthreads();
    float dw = 0;
    sum_columns<Rows>(dq, parts, at, [&](int e, float& x) {
      x = 0;
      recurrent_delta_read_backward_row(state[e], grad[e], k[e], u, q[e], dy, x, dw);
    });
    const float drate = sum_of_block(dw * difference, total, at) * rate * (1 - rate), dfound = -rate * dw;
    sum_columns<Rows>(dk, parts, at, [&](int e, float& x) {
      x = 0;
      recurrent_delta_write_backward_row(state[e], grad[e], k[e], u, dfound, x);
    });
    const float mean_q = warp_dot(q, dq, Rows, at.lane), mean_k = warp_dot(k, dk, Rows, at.lane);
    __syncthreads();
    float dz[3] = {0, 0, real ? -dfound : 0.f};
    if (m < Rows) {
      dq[m] = dz[0] = q[m] * (dq[m] - mean_q);
      dk[m] = dz[1] = k[m] * (dk[m] - mean_k);
      dv[m] = dz[2];
    }
    __syncthreads();
    for (int e = at.warp; e < dim; e += at.warps) {  // a warp for each row of R
      float sum = 0;
      for (int i = 0; i < 3; i++) {
        const float* d = i == 0 ? dq : i == 1 ? dk : dv;
        const T* R = t[4 + i].at<T>(at.h, e);
        for (int j = at.lane; j < dim; j += kColumns) sum += number(R[j * t[4 + i].stride[2]]) * d[j];
      }
      sum = warp_sum(sum);
      if (!at.lane) ds[e] = sum;
    }
#pragma unroll
    for (int e = 0; e < Rows; e++)
      for (int i = 0; i < 3; i++) dR[i][e] += s[e] * dz[i];
    __syncthreads();
    if (!real) continue;
    for (int i = 0; i < 3; i++) put(t[20 + i].at<T>(at.b, step, at.h) + m * t[20 + i].stride[3], dz[i]);
    if (!m) put(t[23].at<T>(at.b, step, at.h), drate);
    dr += drate * s[m];
    dy = (1 - s[m] * s[m]) * (ds[m] + drate * r);
  }
  if (!real) return;
  t[27].at<float>(at.b, at.h)[m * t[27].stride[2]] = dr;
  if (t[29].address) t[29].at<float>(at.b, at.h)[m * t[29].stride[2]] = dy;
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    if (e >= dim) break;
    for (int i = 0; i < 3; i++) t[24 + i].at<float>(at.b, at.h, e)[m * t[24 + i].stride[3]] = dR[i][e];
    if (t[28].address) t[28].at<float>(at.b, at.h, e)[m * t[28].stride[3]] = grad[e];
  }
}

NBS_LAUNCH_HEADS(forward)
NBS_LAUNCH_HEADS(backward)

}  // namespace

NBS_KERNEL_HEADS(recurrent_delta_forward_float32, forward, float, 18, dim)
NBS_KERNEL_HEADS(recurrent_delta_forward_bfloat16, forward, __nv_bfloat16, 18, dim)
NBS_KERNEL_HEADS(recurrent_delta_backward_float32, backward, float, 30, dim)
NBS_KERNEL_HEADS(recurrent_delta_backward_bfloat16, backward, __nv_bfloat16, 30, dim)
