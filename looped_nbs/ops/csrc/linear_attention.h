// Causal linear attention, the arithmetic of one row of the state: S += k v, y = q S. V is a register of columns on
// the CPU and the one column of a thread on the GPU; k and q are numbers.
#pragma once
#include "tensors.h"

template <class V, class T> NBS_SHARED void linear_forward_row(V& state, T k, const V& v, T q, V& y) {
  state += k * v;
  y += q * state;
}

// From the state after the step to the one before it. dq and dk are to be summed over the columns.
template <class V, class T> NBS_SHARED void linear_backward_row(
    V& state, V& grad, T k, const V& v, T q, const V& dy, V& dq, V& dk, V& dv) {
  dq += state * dy;
  state -= k * v;
  grad += q * dy;
  dk += grad * v;
  dv += k * grad;
}
