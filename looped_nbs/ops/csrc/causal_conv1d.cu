// Causal depthwise convolution on the GPU: a warp has 32 channels, and the warps of a block take turns with the steps;
// causal_conv1d.cpp says which tensor is which.
#include "causal_conv1d.h"
#include "warps.h"

namespace {

constexpr int kWarps = 8;
enum { kX, kWeight, kBias, kState, kInputs };

struct Sizes {
  Tensor t[kMaxTensors];
  int batch, time, channels, width, before, silu;
};

template <class T> struct Channel {
  const Sizes& call;
  const Tensor* t = call.t;
  const int b = blockIdx.x, m = blockIdx.y * kColumns + threadIdx.x;
  const bool real = m < call.channels;

  // A number of this channel in row i of a tensor (batch, rows, channels).
  template <class U> __device__ float at(const Tensor& x, int i) const {
    return x.address && real ? number(x.at<U>(b, i)[m * x.stride[2]]) : 0.f;
  }
  template <class U> __device__ void put_at(const Tensor& x, int i, float y) const {
    if (x.address && real) put(x.at<U>(b, i) + m * x.stride[2], y);
  }
  __device__ float input(int step) const {
    return step < 0 ? at<float>(t[kState], call.before + step) : at<T>(t[kX], step);
  }
  __device__ float weight(int j) const { return real ? number(*t[kWeight].at<T>(m, j)) : 0.f; }
  __device__ float sum(int step) const {
    float y = t[kBias].address && real ? number(*t[kBias].at<T>(m, 0)) : 0.f;
    for (int j = 0; j < call.width; j++) causal_conv1d_forward(y, weight(j), input(step - call.before + j));
    return y;
  }
  // The gradient of the sum at a step, none where there is no such step.
  __device__ float gradient(int step) const {
    if (step < 0 || step >= call.time) return 0.f;
    const float g = at<T>(t[kInputs + 1], step);
    if (!call.silu) return g;
    const float x = sum(step);
    return g * silu_slope(x, 1.f / (1.f + expf(-x)));
  }
};

template <class T> __global__ void __launch_bounds__(kColumns * kWarps) forward(const Sizes call) {
  const Channel<T> mine{call};
  for (int step = threadIdx.y; step < call.time; step += blockDim.y) {
    const float y = mine.sum(step);
    mine.template put_at<T>(call.t[kInputs], step, call.silu ? y / (1.f + expf(-y)) : y);
  }
  for (int i = threadIdx.y; i < call.before; i += blockDim.y)
    mine.template put_at<float>(call.t[kInputs + 1], i, mine.input(call.time - call.before + i));
}

template <class T> __global__ void __launch_bounds__(kColumns * kWarps) backward(const Sizes call) {
  __shared__ float parts[kWarps][kColumns];
  const Channel<T> mine{call};
  const Tensor &dfinal = call.t[kInputs + 2], *d = call.t + kInputs + 3;
  for (int step = int(threadIdx.y) - call.before; step < call.time; step += blockDim.y) {
    float dx = 0, unused = 0;
    for (int j = 0; j < call.width; j++)
      causal_conv1d_backward(mine.gradient(step + call.before - j), mine.weight(j), 0.f, dx, unused);
    const int last = step - (call.time - call.before);
    if (last >= 0) dx += mine.template at<float>(dfinal, last);
    if (step < 0) mine.template put_at<float>(d[kState], call.before + step, dx);
    else mine.template put_at<T>(d[kX], step, dx);
  }
  for (int j = 0; j <= call.width; j++) {  // the last one is the bias
    float total = 0, unused = 0;
    for (int step = threadIdx.y; step < call.time; step += blockDim.y)
      causal_conv1d_backward(mine.gradient(step), 0.f, j < call.width ? mine.input(step - call.before + j) : 1.f, unused,
                             total);
    __syncthreads();
    parts[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y || !mine.real) continue;
    for (int w = 1; w < int(blockDim.y); w++) total += parts[w][threadIdx.x];
    if (j < call.width) *d[kWeight].at<float>(mine.b, mine.m, j) = total;
    else if (d[kBias].address) *d[kBias].at<float>(mine.b, mine.m) = total;
  }
}

template <class Kernel> int start(const Kernel& kernel, const Tensor* tensors, int count, const int64_t* n) {
  Sizes call = {{}, int(n[0]), int(n[1]), int(n[2]), int(n[3]), int(n[4]), int(n[5])};
  for (int i = 0; i < count; i++) call.t[i] = tensors[i];
  if (!call.batch || !call.channels) return 0;
  kernel(dim3(call.batch, (call.channels + kColumns - 1) / kColumns), dim3(kColumns, kWarps), call);
  return -int(cudaGetLastError());
}

}  // namespace

#define NBS_CONV(pass, type, name, count) \
  NBS_EXPORT int causal_conv1d_##pass##_##name(const Tensor* tensors, const int64_t* sizes, int64_t stream) { \
    return start([=](dim3 grid, dim3 block, const Sizes& call) { \
      NBS_START((pass<type>), grid, block, reinterpret_cast<cudaStream_t>(stream), call); \
    }, tensors, count, sizes); \
  }
NBS_CONV(forward, float, float32, kInputs + 2)
NBS_CONV(forward, __nv_bfloat16, bfloat16, kInputs + 2)
NBS_CONV(backward, float, float32, 2 * kInputs + 3)
NBS_CONV(backward, __nv_bfloat16, bfloat16, 2 * kInputs + 3)
