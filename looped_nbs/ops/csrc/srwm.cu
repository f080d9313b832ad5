// The self-referential weight matrix on the GPU; heads.h says who holds what, srwm.cpp which tensor is which. The columns of
// the four matrices stand side by side: y, q and k with dim each, then four rates.
#include "heads.h"
#include "srwm.h"

namespace {

constexpr int kRates = 4;
template <int Rows> constexpr int kThreads = (3 * Rows + kRates + kColumns - 1) / kColumns * kColumns;

// The matrix that a column belongs to, and which of its columns it is.
struct Part {
  int i, column;
  bool real;
  __device__ Part(const Seat& at, int dim)
      : i(at.column / dim < 3 ? at.column / dim : 3), column(at.column - i * dim), real(at.column < 3 * dim + kRates) {}
};

template <class T, int Rows> __global__ void __launch_bounds__(kThreads<Rows>) forward(const HeadCall call) {
  __shared__ float x[Rows], z[3 * Rows + kRates], k_before[Rows], change[Rows], rates[kRates];
  const Seat at(call);
  const Part part(at, call.dim);
  const Tensor* t = call.t;
  const int m = at.column, dim = call.dim;
  float W[Rows], u = 0;
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const Tensor& from = t[1 + part.i];
    W[e] = e < dim ? entry(from, from.at<float>(at.b, at.h, e), part.column, part.real) : 0.f;
  }
  clear(x, Rows, at);
  clear(k_before, Rows, at);
  clear(change, Rows, at);
  for (int step = 0; step < call.time; step++) {
    if (m < Rows) x[m] = entry(t[0], t[0].at<T>(at.b, step, at.h), m, m < dim);
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int e = 0; e < Rows; e++) srwm_forward_row(W[e], k_before[e], u, x[e], sum);
    if (part.real) z[m] = sum;
    if (m < dim) put(t[5].at<T>(at.b, step, at.h) + m * t[5].stride[3], sum);
    __syncthreads();
    if (at.warp == 0) warp_softmax(z + dim, dim, at.lane);
    if (at.warp == (at.warps > 1)) warp_softmax(z + 2 * dim, dim, at.lane);
    if (m < kRates) rates[m] = logistic(z[3 * dim + m]);
    __syncthreads();
    if (m < Rows) {
      k_before[m] = m < dim ? z[2 * dim + m] : 0.f;
      change[m] = m < dim ? z[dim + m] - z[2 * dim + m] : 0.f;
    }
    __syncthreads();
    float moved = 0;
#pragma unroll
    for (int e = 0; e < Rows; e++) moved += change[e] * W[e];
    u = rates[part.i] * moved;
    if (!t[10].address) continue;  // nothing is kept
    if (m < dim)
      for (int i = 0; i < 2; i++) t[10 + i].at<float>(at.b, step, at.h)[m * t[10 + i].stride[3]] = z[(1 + i) * dim + m];
    if (part.real) t[12 + part.i].at<float>(at.b, step, at.h)[part.column * t[12 + part.i].stride[3]] = moved;
    if (m < kRates) t[16].at<float>(at.b, step, at.h)[m * t[16].stride[3]] = rates[m];
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (e < dim && part.real)
      t[6 + part.i].at<float>(at.b, at.h, e)[part.column * t[6 + part.i].stride[3]] = W[e] + k_before[e] * u;
}

template <class T, int Rows> __global__ void __launch_bounds__(kThreads<Rows>) backward(const HeadCall call) {
  constexpr int Warps = kThreads<Rows> / kColumns;
  __shared__ float x[Rows], q[Rows], k[Rows], change[Rows], dq[Rows], dk[Rows], sums[Rows], shares[3 * Rows + kRates];
  __shared__ float parts[Warps][Rows];
  const Seat at(call);
  const Part part(at, call.dim);
  const Tensor* t = call.t;
  const int m = at.column, dim = call.dim;
  float W[Rows], G[Rows];
#pragma unroll
  for (int e = 0; e < Rows; e++) {
    const Tensor &from = t[5 + part.i], &more = t[17 + part.i];
    W[e] = e < dim ? entry(from, from.at<float>(at.b, at.h, e), part.column, part.real) : 0.f;
    G[e] = e < dim ? entry(more, more.at<float>(at.b, at.h, e), part.column, part.real) : 0.f;
  }
  clear(x, Rows, at);
  clear(q, Rows, at);
  clear(k, Rows, at);
  clear(change, Rows, at);
  for (int step = call.time - 1; step >= 0; step--) {
    const auto kept = [&](int i) { return entry(t[i], t[i].at<float>(at.b, step, at.h), m, m < dim); };
    __syncthreads();
    if (m < Rows) {
      x[m] = entry(t[0], t[0].at<T>(at.b, step, at.h), m, m < dim);
      q[m] = kept(9), k[m] = kept(10), change[m] = q[m] - k[m];
    }
    __syncthreads();
    const float moved = entry(t[11 + part.i], t[11 + part.i].at<float>(at.b, step, at.h), part.column, part.real);
    const float rate = entry(t[15], t[15].at<float>(at.b, step, at.h), part.i, part.real), u = rate * moved;
    float a = 0;
#pragma unroll
    for (int e = 0; e < Rows; e++) a += k[e] * G[e];
    const float pull = rate * a;
    if (part.real) shares[m] = a * moved;
    sum_columns<Rows>(dk, parts, at, [&](int e, float& sum) {
      sum = 0;
      srwm_wrote_row(G[e], u, sum);
    });
    sum_columns<Rows>(dq, parts, at, [&](int e, float& sum) {
      sum = 0;
      srwm_moved_row(W[e], G[e], k[e], u, change[e], pull, sum);
    });
    if (m < Rows) dk[m] -= dq[m];
    __syncthreads();
    const float mean_q = warp_dot(q, dq, Rows, at.lane), mean_k = warp_dot(k, dk, Rows, at.lane);
    float dz = 0;
    if (part.i == 0 && part.real) dz = entry(t[16], t[16].at<T>(at.b, step, at.h), m, true);
    if (part.i == 1) dz = q[part.column] * (dq[part.column] - mean_q);
    if (part.i == 2) dz = k[part.column] * (dk[part.column] - mean_k);
    if (part.i == 3 && part.real) {
      const int first = part.column * dim, count = part.column < 3 ? dim : kRates;
      for (int j = first; j < first + count; j++) dz += shares[j];
      const float own = number(t[15].at<float>(at.b, step, at.h)[part.column * t[15].stride[3]]);
      dz *= own * (1 - own);
    }
    sum_columns<Rows>(sums, parts, at, [&](int e, float& sum) {
      sum = 0;
      srwm_read_backward_row(W[e], G[e], x[e], dz, sum);
    });
    if (m < dim) put(t[21].at<T>(at.b, step, at.h) + m * t[21].stride[3], sums[m]);
  }
#pragma unroll
  for (int e = 0; e < Rows; e++)
    if (e < dim && part.real)
      t[22 + part.i].at<float>(at.b, at.h, e)[part.column * t[22 + part.i].stride[3]] = G[e];
}

NBS_LAUNCH_HEADS(forward)
NBS_LAUNCH_HEADS(backward)

}  // namespace

NBS_KERNEL_HEADS(srwm_forward_float32, forward, float, 17, 3 * dim + kRates)
NBS_KERNEL_HEADS(srwm_forward_bfloat16, forward, __nv_bfloat16, 17, 3 * dim + kRates)
NBS_KERNEL_HEADS(srwm_backward_float32, backward, float, 26, 3 * dim + kRates)
NBS_KERNEL_HEADS(srwm_backward_bfloat16, backward, __nv_bfloat16, 26, 3 * dim + kRates)
