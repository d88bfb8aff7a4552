#include "../base/grid_stride.cuh"
#include "dropout_kernel.cuh"

namespace two_level_mha {

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, int multiprocessors, cudaStream_t stream) {
  const DropoutMaskWork work{params};
  return launch_grid_stride(work, work.units(), multiprocessors, stream);
}

}  // namespace two_level_mha
