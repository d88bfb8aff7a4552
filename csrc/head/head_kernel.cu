#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "head_kernel.cuh"

namespace two_level_mha {

namespace {

constexpr int kWarps = 8;

template <typename Scalar, typename Angle>
__global__ void __launch_bounds__(kWarps* kHeadLanes)
    head_kernel(const __grid_constant__ HeadWork<Scalar, Angle> work, int64_t rows) {
  const int lane = threadIdx.x % kHeadLanes;
  for (int64_t i = (int64_t)blockIdx.x * kWarps + threadIdx.x / kHeadLanes; i < rows;
       i += (int64_t)gridDim.x * kWarps) {
    const auto row = work.row(i);
    auto scale = (typename HeadWork<Scalar, Angle>::Real)1;
    if (row.weight) {
      auto squares = work.squares(row, lane);
      for (int lanes = kHeadLanes / 2; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
      scale = work.scale(squares);
    }
    work.write(row, lane, scale);
  }
}

}  // namespace

template <typename Scalar, typename Angle>
cudaError_t launch_head(const HeadWork<Scalar, Angle>& work, int multiprocessors, cudaStream_t stream) {
  if (work.rows() == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>((work.rows() + kWarps - 1) / kWarps, (int64_t)multiprocessors * 8);
  head_kernel<<<blocks, kWarps * kHeadLanes, 0, stream>>>(work, work.rows());
  return cudaGetLastError();
}

template cudaError_t launch_head(const HeadWork<double, double>&, int, cudaStream_t);
template cudaError_t launch_head(const HeadWork<float, float>&, int, cudaStream_t);
template cudaError_t launch_head(const HeadWork<__half, __half>&, int, cudaStream_t);
template cudaError_t launch_head(const HeadWork<__half, float>&, int, cudaStream_t);
template cudaError_t launch_head(const HeadWork<__nv_bfloat16, __nv_bfloat16>&, int, cudaStream_t);
template cudaError_t launch_head(const HeadWork<__nv_bfloat16, float>&, int, cudaStream_t);

}  // namespace two_level_mha
