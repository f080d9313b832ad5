// Convolution of whole sequences, one product: V is a register of channels on the CPU and a number on the GPU.
#pragma once
#include "tensors.h"

template <class V> NBS_SHARED void convolution_add(V& y, const V& x, const V& kernel) { y += x * kernel; }
