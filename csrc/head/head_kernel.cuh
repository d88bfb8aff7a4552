// Launch of the kernel of norm_rotary: see head_units.h. No torch. Compiled only, not run.
#pragma once

#include <cuda_runtime.h>

#include "head_units.h"

namespace two_level_mha {

// (Scalar, Angle): double or float twice, __half or __nv_bfloat16 with itself or float.
template <typename Scalar, typename Angle>
cudaError_t launch_head(const HeadWork<Scalar, Angle>& work, int multiprocessors, cudaStream_t stream);

}  // namespace two_level_mha
