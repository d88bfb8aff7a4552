// What the memory-bound kernels share: a loop over units of work.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace two_level_mha {

constexpr int kThreads = 256;

// `Work` is called with every index in [0, count); it is a
// struct of pointers and sizes with a device operator().
template <typename Index, typename Work>
__global__ void __launch_bounds__(kThreads)
    grid_stride_kernel(const __grid_constant__ Work work, Index count) {
  Index step = (Index)gridDim.x * kThreads;
  for (Index i = (Index)blockIdx.x * kThreads + threadIdx.x; i < count; i += step) work(i);
}

// 32-bit indices where they suffice (the loop may run one
// step past count): 64-bit division costs many times more.
template <typename Work>
cudaError_t launch_grid_stride(const Work& work, int64_t count, int multiprocessors, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, (int64_t)multiprocessors * 8);
  if (count < (int64_t(1) << 30))
    grid_stride_kernel<uint32_t><<<blocks, kThreads, 0, stream>>>(work, (uint32_t)count);
  else
    grid_stride_kernel<int64_t><<<blocks, kThreads, 0, stream>>>(work, count);
  return cudaGetLastError();
}

}  // namespace two_level_mha
