// Tensors as Python hands them over: five 64-bit integers each, the address and four strides counted in elements.
// An absent tensor has address 0. Included by the C++ and the CUDA sources.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define NBS_SHARED __host__ __device__ __forceinline__
#else
#define NBS_SHARED inline __attribute__((always_inline))
#endif
#define NBS_EXPORT extern "C" __attribute__((visibility("default")))

struct Tensor {
  int64_t address, stride[4];

  // Address of the element (i, j, k, 0), or null for an absent tensor.
  template <class T> NBS_SHARED T* at(int64_t i, int64_t j, int64_t k = 0) const {
    if (!address) return nullptr;
    return reinterpret_cast<T*>(address) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};
