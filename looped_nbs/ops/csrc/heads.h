// What the CUDA kernels of strictly sequential operators share. A block works on one head, each thread on one column of its
// matrices, of which it holds the rows itself; what all need of a step stands in shared memory. No atomics.
#pragma once
#include "warps.h"

struct HeadCall {
  Tensor t[36];
  int batch, time, heads, dim;
};

__device__ __forceinline__ float logistic(float x) { return 1.f / (1.f + expf(-x)); }

// Where a thread is in a block of one head.
struct Seat {
  int b, h, lane, warp, warps, column, threads;

  __device__ explicit Seat(const HeadCall& call)
      : b(blockIdx.x / call.heads), h(blockIdx.x % call.heads), lane(threadIdx.x), warp(threadIdx.y), warps(blockDim.y),
        column(threadIdx.y * kColumns + threadIdx.x), threads(blockDim.y * kColumns) {}
};

// Zeros in shared memory, behind the last column too; the caller waits for the block.
__device__ __forceinline__ void clear(float* to, int n, const Seat& at) {
  for (int i = at.column; i < n; i += at.threads) to[i] = 0;
}

// Probabilities of n numbers in shared memory, by one warp.
__device__ __forceinline__ void warp_softmax(float* z, int n, int lane) {
  float top = -INFINITY, total = 0;
  for (int i = lane; i < n; i += kColumns) top = fmaxf(top, z[i]);
  for (int lanes = 16; lanes; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
  for (int i = lane; i < n; i += kColumns) total += z[i] = expf(z[i] - top);
  total = warp_sum(total);
  for (int i = lane; i < n; i += kColumns) z[i] /= total;
}

__device__ __forceinline__ float warp_dot(const float* a, const float* b, int n, int lane) {
  float total = 0;
  for (int i = lane; i < n; i += kColumns) total += a[i] * b[i];
  return warp_sum(total);
}

// The sum of x over the block, the same in all threads; `parts` has room for every warp.
__device__ __forceinline__ float sum_of_block(float x, float* parts, const Seat& at) {
  x = warp_sum(x);
  __syncthreads();
  if (!at.lane) parts[at.warp] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < at.warps; w++) x += parts[w];
  return x;
}

// Sums over the columns of all rows: f(row, x) sets x, the share of this column. `to` and `parts` are in shared memory.
template <int Rows, class F>
__device__ __forceinline__ void sum_columns(float* to, float (*parts)[Rows], const Seat& at, const F& f) {
  constexpr int Group = Rows < 16 ? Rows : 16, Width = kColumns / Group;
#pragma unroll
  for (int group = 0; group < Rows; group += Group) {
    float x[Group];
#pragma unroll
    for (int i = 0; i < Group; i++) f(group + i, x[i]);
    const float sum = row_sums(x, at.lane);
    if (at.lane % Width == 0) parts[at.warp][group + at.lane / Width] = sum;
  }
  __syncthreads();
  for (int row = at.column; row < Rows; row += at.threads) {
    float sum = 0;
    for (int w = 0; w < at.warps; w++) sum += parts[w][row];
    to[row] = sum;
  }
  __syncthreads();
}

// Kernel<T, Rows> in the smallest size that holds dim rows, with one thread for each of `columns(dim)` columns.
template <template <class, int> class Kernel, class T, class F>
int launch_heads(const Tensor* tensors, int count, const int64_t* sizes, int64_t stream, const F& columns) {
  HeadCall call = {{}, int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3])};
  for (int i = 0; i < count; i++) call.t[i] = tensors[i];
  const dim3 grid(call.batch * call.heads), block(kColumns, (columns(call.dim) + kColumns - 1) / kColumns);
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  if (!grid.x) return 0;
  if (call.dim <= 8) Kernel<T, 8>::launch(grid, block, s, call);
  else if (call.dim <= 16) Kernel<T, 16>::launch(grid, block, s, call);
  else if (call.dim <= 32) Kernel<T, 32>::launch(grid, block, s, call);
  else if (call.dim <= 64) Kernel<T, 64>::launch(grid, block, s, call);
  else Kernel<T, kMaxDim>::launch(grid, block, s, call);
  return -int(cudaGetLastError());
}

#define NBS_LAUNCH_HEADS(kernel) \
  template <class T, int Rows> struct kernel##Launch { \
    static void launch(dim3 grid, dim3 block, cudaStream_t stream, const HeadCall& call) { \
      NBS_START((kernel<T, Rows>), grid, block, stream, call); \
    } \
  };
#define NBS_KERNEL_HEADS(name, kernel, type, count, columns) \
  NBS_EXPORT int name(const Tensor* tensors, const int64_t* sizes, int64_t stream) { \
    return launch_heads<kernel##Launch, type>(tensors, count, sizes, stream, [](int dim) { return columns; }); \
  }
