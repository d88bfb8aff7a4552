// Launches of what the ranks compare: see seal_units.h. No torch. Compiled only, not run.
#pragma once

#include <cuda_runtime.h>

#include "seal_units.h"

namespace two_level_mha {

cudaError_t launch_hash(const HashWork& work, uint64_t* hash, int multiprocessors, cudaStream_t stream);

// Scalar: double, float, __half or __nv_bfloat16.
template <typename Scalar>
cudaError_t launch_digits(const DigitsWork<Scalar>& work, int64_t digits, cudaStream_t stream);
template <typename Scalar>
cudaError_t launch_verdict(const VerdictWork<Scalar>& work, cudaStream_t stream);

}  // namespace two_level_mha
