// Launch of the merge kernel: see merge_units.h. No torch. Compiled only, not run.
#pragma once

#include <cuda_runtime.h>

#include "merge_units.h"

namespace two_level_mha {

// Scalar: double, float, __half or __nv_bfloat16.
template <typename Scalar>
cudaError_t launch_merge(const MergeParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace two_level_mha
