// Enough of CUDA to run the kernels on a CPU, one thread of the system for each thread of a block and one block after the
// other: tests of indices, barriers and arithmetic where there is no GPU. Deadlocks and races it shows only by luck.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline float exchanged[32][32];

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { warp_barriers[threadIdx.y]->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  exchanged[threadIdx.y][threadIdx.x] = x;
  __syncwarp();
  const float other = exchanged[threadIdx.y][threadIdx.x ^ mask];
  __syncwarp();
  return other;
}

template <class F> void run_blocks(dim3 grid, dim3 block, const F& kernel) {
  block_barrier = std::make_unique<std::barrier<>>(block.x * block.y);
  warp_barriers.clear();
  for (unsigned y = 0; y < block.y; y++) warp_barriers.push_back(std::make_unique<std::barrier<>>(block.x));
  std::vector<std::thread> threads;
  for (unsigned y = 0; y < block.y; y++)
    for (unsigned x = 0; x < block.x; x++)
      threads.emplace_back([=] {
        threadIdx = {x, y}, blockDim = block, gridDim = grid;
        for (unsigned j = 0; j < grid.y; j++)
          for (unsigned i = 0; i < grid.x; i++) {
            blockIdx = {i, j};
            kernel();
            __syncthreads();
          }
      });
  for (auto& thread : threads) thread.join();
}

#define NBS_START(kernel, grid, block, stream, call) run_blocks(grid, block, [=] { kernel(call); })
