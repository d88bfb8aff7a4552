#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../base/grid_stride.cuh"
#include "seal_kernel.cuh"

namespace two_level_mha {

namespace {

constexpr int kWarp = 32;
constexpr int64_t kUnitsOfOneBlock = 16 * kThreads;  // less is done before a second launch would have begun

// One block writes the hash, several add to it.
template <typename Index>
__global__ void __launch_bounds__(kThreads)
    hash_kernel(const __grid_constant__ HashWork work, Index count, uint64_t* hash) {
  __shared__ uint64_t sums[kThreads / kWarp];
  const Index step = (Index)gridDim.x * kThreads;
  uint64_t sum = 0;
  for (Index i = (Index)blockIdx.x * kThreads + threadIdx.x; i < count; i += step) sum += work(i);
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += sums[warp];
  if (blockIdx.x == 0) sum += work.base();
  if (gridDim.x == 1)
    *hash = sum;
  else
    atomicAdd((unsigned long long*)hash, (unsigned long long)sum);
}

}  // namespace

cudaError_t launch_hash(const HashWork& work, uint64_t* hash, int multiprocessors, cudaStream_t stream) {
  int64_t blocks = 1;
  if (work.units > kUnitsOfOneBlock) {
    blocks = std::min<int64_t>((work.units + kThreads - 1) / kThreads, (int64_t)multiprocessors * 8);
    const cudaError_t error = cudaMemsetAsync(hash, 0, sizeof *hash, stream);
    if (error != cudaSuccess) return error;
  }
  if (work.units < (int64_t(1) << 30))
    hash_kernel<uint32_t><<<blocks, kThreads, 0, stream>>>(work, (uint32_t)work.units, hash);
  else
    hash_kernel<int64_t><<<blocks, kThreads, 0, stream>>>(work, work.units, hash);
  return cudaGetLastError();
}

template <typename Scalar>
cudaError_t launch_digits(const DigitsWork<Scalar>& work, int64_t digits, cudaStream_t stream) {
  return launch_grid_stride(work, digits, 1, stream);
}

template <typename Scalar>
cudaError_t launch_verdict(const VerdictWork<Scalar>& work, cudaStream_t stream) {
  return launch_grid_stride(work, 1, 1, stream);
}

#define TLM_LAUNCHES(Scalar)                                                            \
  template cudaError_t launch_digits(const DigitsWork<Scalar>&, int64_t, cudaStream_t); \
  template cudaError_t launch_verdict(const VerdictWork<Scalar>&, cudaStream_t)
TLM_LAUNCHES(double);
TLM_LAUNCHES(float);
TLM_LAUNCHES(__half);
TLM_LAUNCHES(__nv_bfloat16);

}  // namespace two_level_mha
