// Rotary position embedding: pairs of the head dimension are turned by an angle that goes with the token.
#pragma once

#include <ATen/core/Tensor.h>

namespace two_level_mha {

using at::Tensor;

// x (B, H, L, d), cos and sin (B or 1, 1, L, r) with r even and at most d -> x with its first r dims turned:
//
//   x * cos + turned(x) * sin,  turned(a, b) = (-b, a) for the pairs (a, b)
//
// which are dims c and c + r / 2 (rotate-half), or 2 c and 2 c + 1 if interleaved; dims from r on pass
// through. Computed in the promotion of the three dtypes, returned in x's.
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved);

}  // namespace two_level_mha
