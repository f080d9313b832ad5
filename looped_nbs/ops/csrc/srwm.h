// Self-referential weight matrix, the arithmetic of one row of the four matrices side by side. V is a register of columns
// on the CPU and the one column of a thread on the GPU; T is a number.
#pragma once
#include "tensors.h"

// The write of the step before, then the product with the input of this step.
template <class V, class T> NBS_SHARED void srwm_forward_row(V& W, T k_before, const V& u_before, T x, V& z) {
  W += k_before * u_before;
  z += x * W;
}

// How the gradient after the step looks at the write; to be summed over the columns.
template <class V> NBS_SHARED void srwm_wrote_row(const V& grad, const V& u, V& wrote) { wrote += grad * u; }

// From the matrices after the step to those before it, and back through what was moved; to be summed over the columns.
template <class V, class T> NBS_SHARED void srwm_moved_row(V& W, V& grad, T k, const V& u, T change, const V& e, V& moved) {
  W -= k * u;
  moved += W * e;
  grad += change * e;
}

// Back through the product with the input; dx is to be summed over the columns.
template <class V, class T> NBS_SHARED void srwm_read_backward_row(const V& W, V& grad, T x, const V& dz, V& dx) {
  dx += W * dz;
  grad += x * dz;
}
