#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../base/grid_stride.cuh"
#include "merge_kernel.cuh"

namespace two_level_mha {

template <typename Scalar>
cudaError_t launch_merge(const MergeParams& params, int multiprocessors, cudaStream_t stream) {
  return with_merge_units<Scalar>(params, [&](const auto& work, int64_t units) {
    return launch_grid_stride(work, units, multiprocessors, stream);
  });
}

template cudaError_t launch_merge<double>(const MergeParams&, int, cudaStream_t);
template cudaError_t launch_merge<float>(const MergeParams&, int, cudaStream_t);
template cudaError_t launch_merge<__half>(const MergeParams&, int, cudaStream_t);
template cudaError_t launch_merge<__nv_bfloat16>(const MergeParams&, int, cudaStream_t);

}  // namespace two_level_mha
