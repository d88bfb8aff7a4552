// The machine that a tensor is on, as request.h has it.
#pragma once

#include <ATen/core/Tensor.h>

#include "request.h"

namespace two_level_mha {

Machine machine_of(const at::Tensor& x);

// 90 for sm_90
int gpu_arch(int64_t device);

}  // namespace two_level_mha
