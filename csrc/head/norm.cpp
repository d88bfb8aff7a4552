#include "norm.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/rms_norm.h>

#include "../base/sizes.h"

namespace two_level_mha {

Tensor head_norm(const Tensor& x, const Tensor& weight, double eps) {
  // Under autocast rms_norm answers in float32
  const auto dtype = x.scalar_type();
  return at::rms_norm(x, {fixed_size(x, -1)}, weight.to(dtype), eps).to(dtype);
}

}  // namespace two_level_mha
