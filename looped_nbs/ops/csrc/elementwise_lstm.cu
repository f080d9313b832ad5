// The element-wise LSTM on the GPU: one thread for each channel goes through time; elementwise_lstm.cpp says which tensor is
// which.
#include "elementwise_lstm.h"
#include "heads.h"

namespace {

template <class T, int Rows> __global__ void __launch_bounds__(Rows < 32 ? 32 : Rows) forward(const HeadCall call) {
  const Seat at(call);
  const Tensor* t = call.t;
  const int m = at.column;
  if (m >= call.dim) return;
  const float* start = t[4].at<float>(at.b, at.h);
  float c = start ? start[m * t[4].stride[2]] : 0.f;
  const float w_z = number(t[2].at<T>(at.h, 0)[m * t[2].stride[1]]);
  const float w_f = number(t[3].at<T>(at.h, 0)[m * t[3].stride[1]]);
  for (int step = 0; step < call.time; step++) {
    if (t[7].address) t[7].at<float>(at.b, step, at.h)[m * t[7].stride[3]] = c;
    const float z = entry(t[0], t[0].at<T>(at.b, step, at.h), m, true) + w_z * c;
    const float f = entry(t[1], t[1].at<T>(at.b, step, at.h), m, true) + w_f * c;
    c = elementwise_lstm_cell(c, tanhf(z), logistic(f));
    put(t[5].at<T>(at.b, step, at.h) + m * t[5].stride[3], c);
  }
  t[6].at<float>(at.b, at.h)[m * t[6].stride[2]] = c;
}

template <class T, int Rows> __global__ void __launch_bounds__(Rows < 32 ? 32 : Rows) backward(const HeadCall call) {
  const Seat at(call);
  const Tensor* t = call.t;
  const int m = at.column;
  if (m >= call.dim) return;
  const float* last = t[8].at<float>(at.b, at.h);
  float carry = last ? last[m * t[8].stride[2]] : 0.f, dw_z = 0, dw_f = 0;
  const float w_z = number(t[2].at<T>(at.h, 0)[m * t[2].stride[1]]);
  const float w_f = number(t[3].at<T>(at.h, 0)[m * t[3].stride[1]]);
  for (int step = call.time - 1; step >= 0; step--) {
    const float c = entry(t[6], t[6].at<float>(at.b, step, at.h), m, true);
    const float z = tanhf(entry(t[0], t[0].at<T>(at.b, step, at.h), m, true) + w_z * c);
    const float f = logistic(entry(t[1], t[1].at<T>(at.b, step, at.h), m, true) + w_f * c);
    const float g = carry + entry(t[7], t[7].at<T>(at.b, step, at.h), m, true);
    float dz, df;
    carry = elementwise_lstm_backward(c, z, f, w_z, w_f, g, dz, df);
    dw_z += dz * c;
    dw_f += df * c;
    put(t[9].at<T>(at.b, step, at.h) + m * t[9].stride[3], dz);
    put(t[10].at<T>(at.b, step, at.h) + m * t[10].stride[3], df);
  }
  t[11].at<float>(at.b, at.h)[m * t[11].stride[2]] = dw_z;
  t[12].at<float>(at.b, at.h)[m * t[12].stride[2]] = dw_f;
  if (t[13].address) t[13].at<float>(at.b, at.h)[m * t[13].stride[2]] = carry;
}

NBS_LAUNCH_HEADS(forward)
NBS_LAUNCH_HEADS(backward)

}  // namespace

NBS_KERNEL_HEADS(elementwise_lstm_forward_float32, forward, float, 8, dim)
NBS_KERNEL_HEADS(elementwise_lstm_forward_bfloat16, forward, __nv_bfloat16, 8, dim)
NBS_KERNEL_HEADS(elementwise_lstm_backward_float32, backward, float, 14, dim)
NBS_KERNEL_HEADS(elementwise_lstm_backward_bfloat16, backward, __nv_bfloat16, 14, dim)
