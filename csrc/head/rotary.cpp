#include "rotary.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include "../base/sizes.h"

namespace two_level_mha {

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  const int64_t d = fixed_size(x, -1), r = fixed_size(cos, -1);
  TORCH_CHECK_VALUE(fixed_size(sin, -1) == r && r % 2 == 0 && r <= d,
                    "cos and sin must have the same even width, at most head_dim ", d, ", got ", r, " and ",
                    fixed_size(sin, -1));
  const int64_t pair = interleaved ? -1 : -2;  // the dim that tells the two of a pair apart
  auto pairs = [&](const Tensor& t) {
    const int64_t half = r / 2;
    return (interleaved ? t.unflatten(-1, {half, 2}) : t.unflatten(-1, {2, half})).unbind(pair);
  };
  const auto a = pairs(x.narrow(-1, 0, r)), c = pairs(cos), s = pairs(sin);
  Tensor turned = at::stack({a[0] * c[0] - a[1] * s[0], a[1] * c[1] + a[0] * s[1]}, pair).flatten(-2);
  turned = turned.to(x.scalar_type());
  return r == d ? turned : at::cat({turned, x.narrow(-1, r, d - r)}, -1);
}

}  // namespace two_level_mha
