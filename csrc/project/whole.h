// The weights of a slice group put together on each of its ranks (scheme "weights"). Adjoint: each rank gets
// the sum of the gradients of its blocks, since the ranks use the whole for different tokens.
#pragma once

#include "../place.h"
#include "projection.h"

namespace two_level_mha {

// Extra keys every query sees (nn.MultiheadAttention's add_bias_kv, add_zero_attn); biases (K, E).
struct ExtraKeys {
  std::optional<Tensor> bias_k, bias_v;
  bool zero = false;
};

// (H, E, D) -> (H, d, D) and so on, in one exchange.
std::pair<QkvWeights, ExtraKeys> whole_weights(const QkvWeights& weights, const ExtraKeys& extra,
                                               const Place& place);

// (D, H, E) -> (D, H, d)
Tensor whole_out_weight(const Tensor& weight, const Place& place);

}  // namespace two_level_mha
