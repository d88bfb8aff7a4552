// Launch of the dropout mask kernel: dropout_mask.h as pointers and sizes. No torch. Compiled only, not run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace two_level_mha {

struct DropoutMaskParams {
  const int64_t* seed;  // one element, read on the device
  bool* keep;           // (batches, heads, rows, columns), contiguous
  int64_t batches, heads, rows, columns;
  int64_t origin[3];  // global (batch, head, row) of element [0, 0, 0, 0]
  uint32_t threshold;
};

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace two_level_mha
