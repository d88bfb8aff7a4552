// Launches of the pack kernels: see pack_units.h. No torch. Compiled only, not run.
#pragma once

#include <cuda_runtime.h>

#include "pack_units.h"

namespace two_level_mha {

// `params` in units of unit_bytes (1, 2, 4, 8 or 16), as make_units leaves them.
cudaError_t launch_pack(const PackParams& params, int64_t unit_bytes, int multiprocessors,
                        cudaStream_t stream);

enum class SumType { none, float64, float32, float16, bfloat16 };

// sum: dtype of the elements if a replicated tensor is among them; units hold at least one.
cudaError_t launch_unpack(const PackParams& params, int64_t unit_bytes, SumType sum, int multiprocessors,
                          cudaStream_t stream);

}  // namespace two_level_mha
