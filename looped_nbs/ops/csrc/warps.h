// What the CUDA kernels share. A block works on one head and 32 columns of its state, one column a thread; each of its
// warps holds Rows rows of them in registers. No atomics: sums are made in the same order every time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "tensors.h"

constexpr int kMaxDim = 256, kColumns = 32, kMaxWarps = 4, kMaxTensors = 24;

struct Call {
  Tensor t[kMaxTensors];
  int batch, time, heads, d_k, d_v;
};

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

// Where a thread is.
struct Place {
  int b, h, slab, lane, warp, warps, column, row;
  bool real;  // is there such a column?

  __device__ Place(const Call& call, int rows)
      : b(blockIdx.x / call.heads), h(blockIdx.x % call.heads), slab(blockIdx.y), lane(threadIdx.x),
        warp(threadIdx.y), warps(blockDim.y), column(slab * kColumns + lane), row(warp * rows),
        real(column < call.d_v) {}
};

// An entry of a row, or 0 where there is none.
template <class T> __device__ float entry(const Tensor& t, const T* row, int i, bool real) {
  return row && real ? number(row[i * t.stride[3]]) : 0.f;
}

// Spread a row over the block, with zeros after its end.
template <class T> __device__ void stage(float* to, const Tensor& t, const T* row, int n, int padded) {
  for (int i = threadIdx.y * kColumns + threadIdx.x; i < padded; i += blockDim.y * kColumns) to[i] = entry(t, row, i, i < n);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Sums over the columns of N rows (N a power of two, at most 32). Afterwards lane l has that of row l / (32 / N).
template <int N> __device__ __forceinline__ float row_sums(float (&x)[N], int lane) {
#pragma unroll
  for (int half = N / 2, lanes = 16; half; half /= 2, lanes /= 2) {
    const bool upper = lane & lanes;
#pragma unroll
    for (int i = 0; i < N / 2; i++)
      if (i < half) {
        const float away = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
        x[i] = kept + __shfl_xor_sync(~0u, away, lanes);
      }
  }
#pragma unroll
  for (int lanes = 16 / N; lanes; lanes /= 2) x[0] += __shfl_xor_sync(~0u, x[0], lanes);
  return x[0];
}

// Sum over the warps of a block, the same in all of them. The caller alternates between two buffers.
__device__ __forceinline__ float block_sum(float x, float (*buffer)[kColumns], const Place& at) {
  if (at.warps == 1) return x;
  buffer[at.warp][at.lane] = x;
  __syncthreads();
  x = buffer[0][at.lane];
  for (int w = 1; w < at.warps; w++) x += buffer[w][at.lane];
  return x;
}

// Row (batch, step, head) of a dense gradient (slabs, batch, time, heads, d_k) that is summed over the slabs later.
__device__ __forceinline__ float* slab_row(const Tensor& t, const Place& at, int step, const Call& call) {
  const int64_t row = ((int64_t(at.slab) * call.batch + at.b) * call.time + step) * call.heads + at.h;
  return reinterpret_cast<float*>(t.address) + row * call.d_k;
}

// Kernel<Rows>::launch in the smallest size that holds d_k rows.
template <template <class, int> class Kernel, class T>
int launch(const Tensor* tensors, int count, const int64_t* sizes, int64_t stream) {
  Call call = {{}, int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[4])};
  for (int i = 0; i < count; i++) call.t[i] = tensors[i];
  const dim3 grid(call.batch * call.heads, (call.d_v + kColumns - 1) / kColumns);
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  if (!grid.x) return 0;
  const int n = call.d_k;
  if (n <= 8) Kernel<T, 8>::launch(grid, 1, s, call);
  else if (n <= 16) Kernel<T, 16>::launch(grid, 1, s, call);
  else if (n <= 32) Kernel<T, 32>::launch(grid, 1, s, call);
  else Kernel<T, 64>::launch(grid, (n + 63) / 64, s, call);
  return -int(cudaGetLastError());
}

#ifndef NBS_START  // tests start kernels in another way
#define NBS_START(kernel, grid, block, stream, call) kernel<<<grid, block, 0, stream>>>(call)
#endif
#define NBS_LAUNCH(kernel) \
  template <class T, int Rows> struct kernel##Launch { \
    static void launch(dim3 grid, int warps, cudaStream_t stream, const Call& call) { \
      NBS_START((kernel<T, Rows>), grid, dim3(kColumns, warps), stream, call); \
    } \
  };
#define NBS_KERNEL(name, kernel, type, count) \
  NBS_EXPORT int name(const Tensor* tensors, const int64_t* sizes, int64_t stream) { \
    return launch<kernel##Launch, type>(tensors, count, sizes, stream); \
  }
