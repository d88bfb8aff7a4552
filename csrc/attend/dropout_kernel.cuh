// Launch of the dropout mask kernel: see dropout_units.h. No torch. Compiled only, not run.
#pragma once

#include <cuda_runtime.h>

#include "dropout_units.h"

namespace two_level_mha {

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace two_level_mha
