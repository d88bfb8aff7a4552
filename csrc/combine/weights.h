// Attention weights of all ranks, put together.
#pragma once

#include "../place.h"

namespace two_level_mha {

// A rank's weights (B, H, rows, S) -> (B, h, L, S), or (B, L, S) averaged over the heads, the same on every
// rank, and differentiable: each element's gradient reaches exactly one rank's graph.
Tensor gather_weights(const Tensor& weights, const SchemeRow& row, const Place& place,
                      const c10::SymInt& batch, const c10::SymInt& length, bool zigzag, bool average);

}  // namespace two_level_mha
