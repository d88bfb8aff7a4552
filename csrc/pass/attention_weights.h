// Attention weights of all ranks, put together.
#pragma once

#include "context.h"

namespace two_level_mha {

using at::Tensor;

// A rank's weights (B, H, rows, S) -> (B, h, L, S), or (B, L, S) averaged over the heads, the same on every
// rank, and differentiable: each element's gradient reaches exactly one rank's graph.
Tensor gather_weights(const Tensor& weights, const Context& context, bool average);

}  // namespace two_level_mha
