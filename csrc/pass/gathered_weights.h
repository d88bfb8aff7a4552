// The weights of a slice group put together on each of its ranks (scheme "weights"). Adjoint: each rank gets
// the sum of the gradients of its blocks, since the ranks use the whole for different tokens.
#pragma once

#include "context.h"
#include "extra_keys.h"
#include "projection.h"

namespace two_level_mha {

// (H, E, D) -> (H, d, D) and so on, in one exchange.
std::pair<QkvWeights, ExtraKeys> gather_qkv_weights(const QkvWeights& weights, const ExtraKeys& extra,
                                                    const Context& context);

// (D, H, E) -> (D, H, d)
Tensor gather_out_weight(const Tensor& weight, const Context& context);

}  // namespace two_level_mha
