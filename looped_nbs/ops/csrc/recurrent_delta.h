// Recurrent delta rule, the arithmetic of one row of the memory. V is a register of columns on the CPU and the one
// column of a thread on the GPU; T is a number.
#pragma once
#include "tensors.h"

// The write of the step before, then both reads of this step.
template <class V, class T> NBS_SHARED void recurrent_delta_forward_row(
    V& state, T k_before, const V& u_before, T k, T q, V& found, V& y) {
  state += k_before * u_before;
  found += k * state;
  y += q * state;
}

// From the memory after the step to the one before it; dq is to be summed over the columns.
template <class V, class T> NBS_SHARED void recurrent_delta_read_backward_row(
    V& state, V& grad, T k, const V& u, T q, const V& dy, V& dq, V& dw) {
  dq += state * dy;
  state -= k * u;
  grad += q * dy;
  dw += k * grad;
}

// Back through the write; dk is to be summed over the columns.
template <class V, class T> NBS_SHARED void recurrent_delta_write_backward_row(
    const V& state, V& grad, T k, const V& u, const V& dfound, V& dk) {
  dk += grad * u + state * dfound;
  grad += k * dfound;
}
