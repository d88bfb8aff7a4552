// Attention that also returns its weights.
#pragma once

#include "partial_attention.h"

namespace two_level_mha {

// -> out (B, H, L, Dv), weights after dropout (B, H, L, S); a row that sees no key is NaN in both.
std::tuple<Tensor, Tensor> attention_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Attend& attend);

}  // namespace two_level_mha
