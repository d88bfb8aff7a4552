// Attention that also returns its weights.
#pragma once

#include "partial_attention.h"

namespace two_level_mha {

// -> out (B, H, L, Dv), weights after dropout (B, H, L, S); a row that sees no key is NaN in both.
// sinks (H,): of each head the logit of one key more, whose value is zero, and whose weight is not returned.
std::tuple<Tensor, Tensor> attention_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Attend& attend, const std::optional<Tensor>& sinks);

}  // namespace two_level_mha
