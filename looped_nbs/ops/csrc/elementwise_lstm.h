// Element-wise LSTM, one channel: V is a register of channels on the CPU and a number on the GPU.
#pragma once
#include "tensors.h"

// c = f c_before + (1 - f) z, written so that equal values stay what they are.
template <class V> NBS_SHARED V elementwise_lstm_cell(const V& c, const V& z, const V& f) { return z + f * (c - z); }

// From the gradient g of the cell to those of the inputs of both gates; returns that of the cell before.
template <class V> NBS_SHARED V elementwise_lstm_backward(const V& c, const V& z, const V& f, const V& w_z, const V& w_f,
                                                          const V& g, V& dz, V& df) {
  dz = g * (1 - f) * (1 - z * z);
  df = g * (c - z) * f * (1 - f);
  return g * f + dz * w_z + df * w_f;
}
