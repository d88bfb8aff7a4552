// Launch of the merge kernel: parameters of merge.h as pointers and sizes. No torch. Compiled only, not run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace two_level_mha {

struct MergeParams {
  const void* outs;  // (parts, rows, width), contiguous
  const void* lses;  // (parts, rows)
  void* out;         // (rows, width)
  void* lse;         // (rows)
  int64_t parts, rows, width;
};

// Scalar: double, float, __half or __nv_bfloat16.
template <typename Scalar>
cudaError_t launch_merge(const MergeParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace two_level_mha
