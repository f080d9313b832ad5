// Causal depthwise convolution, one weight of one channel: V is a register of channels on the CPU and a number on the GPU.
#pragma once
#include "tensors.h"

template <class V> NBS_SHARED void causal_conv1d_forward(V& y, const V& weight, const V& x) { y += weight * x; }

// g is the gradient of the result, before the activation.
template <class V> NBS_SHARED void causal_conv1d_backward(const V& g, const V& weight, const V& x, V& dx, V& dweight) {
  dx += weight * g;
  dweight += g * x;
}

// The derivative of x sigmoid(x), of x and its sigmoid.
template <class V> NBS_SHARED V silu_slope(const V& x, const V& gate) { return gate * (1 + x * (1 - gate)); }
