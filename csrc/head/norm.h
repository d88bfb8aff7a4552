// Normalisation of every head's vector.
#pragma once

#include <ATen/core/Tensor.h>

namespace two_level_mha {

using at::Tensor;

// x (B, H, L, d), weight (d,) -> weight * x / sqrt(mean of x^2 over
// d + eps), in x's dtype; half precision is summed in float32.
Tensor head_norm(const Tensor& x, const Tensor& weight, double eps);

}  // namespace two_level_mha
