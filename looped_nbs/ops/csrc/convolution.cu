// Causal convolution with a kernel as long as the sequence, on the GPU, by its definition: a warp has 32 channels, and the
// warps of a block take turns with the steps; convolution.cpp says which tensor is which.
#include "convolution.h"
#include "warps.h"

namespace {

constexpr int kWarps = 8;

struct Sizes {
  Tensor t[5];
  int batch, time, channels;
};

template <class T> __device__ float at(const Tensor& x, int b, int step, int channel) {  // (batch, time, channels)
  return x.address ? number(x.at<T>(b, step)[channel * x.stride[2]]) : 0.f;
}

template <class T> __global__ void __launch_bounds__(kColumns * kWarps) forward(const Sizes call) {
  const Tensor* t = call.t;
  const int b = blockIdx.x, m = blockIdx.y * kColumns + threadIdx.x;
  for (int step = threadIdx.y; step < call.time && m < call.channels; step += blockDim.y) {
    float y = 0;
    for (int s = 0; s <= step; s++) convolution_add(y, at<T>(t[0], b, s, m), number(*t[1].at<T>(step - s, m)));
    put(t[2].at<T>(b, step) + m * t[2].stride[2], y);
  }
}

// dkernel of each example apart
template <class T> __global__ void __launch_bounds__(kColumns * kWarps) backward(const Sizes call) {
  const Tensor* t = call.t;
  const int b = blockIdx.x, m = blockIdx.y * kColumns + threadIdx.x;
  for (int step = threadIdx.y; step < call.time && m < call.channels; step += blockDim.y) {
    float dx = 0, dkernel = 0;
    for (int s = step; s < call.time; s++) {
      const float g = at<T>(t[2], b, s, m);
      convolution_add(dx, g, number(*t[1].at<T>(s - step, m)));
      convolution_add(dkernel, g, at<T>(t[0], b, s - step, m));
    }
    put(t[3].at<T>(b, step) + m * t[3].stride[2], dx);
    t[4].at<float>(b, step)[m * t[4].stride[2]] = dkernel;
  }
}

template <class Kernel> int start(const Kernel& kernel, const Tensor* tensors, int count, const int64_t* n) {
  Sizes call = {{}, int(n[0]), int(n[1]), int(n[2])};
  for (int i = 0; i < count; i++) call.t[i] = tensors[i];
  if (!call.batch || !call.channels) return 0;
  kernel(dim3(call.batch, (call.channels + kColumns - 1) / kColumns), dim3(kColumns, kWarps), call);
  return -int(cudaGetLastError());
}

}  // namespace

#define NBS_CONVOLUTION(pass, type, name, count) \
  NBS_EXPORT int convolution_##pass##_##name(const Tensor* tensors, const int64_t* sizes, int64_t stream) { \
    return start([=](dim3 grid, dim3 block, const Sizes& call) { \
      NBS_START((pass<type>), grid, block, reinterpret_cast<cudaStream_t>(stream), call); \
    }, tensors, count, sizes); \
  }
NBS_CONVOLUTION(forward, float, float32, 3)
NBS_CONVOLUTION(forward, __nv_bfloat16, bfloat16, 3)
NBS_CONVOLUTION(backward, float, float32, 5)
NBS_CONVOLUTION(backward, __nv_bfloat16, bfloat16, 5)
