// Entering and leaving the pass with tokens sharded over the slice group (scheme "weights"): the gradients
// and the outputs of a rank are complete but for the sum over the head groups.
#pragma once

#include "move.h"

namespace two_level_mha {

// Forward: this rank's tokens of (B, L, D), each the same on every rank. Backward: summed over the head axis
// and gathered over the slice axis, in one exchange for all.
std::vector<Tensor> enter_sharded(const std::vector<Tensor>& xs, const Context& context);

// Forward: this rank's tokens, summed over the head axis and gathered over the slice axis -> (B, L, D), the
// same bits on every rank. Backward: this rank's tokens of the gradient.
Tensor reduce_sharded(const Tensor& y, const Context& context);

}  // namespace two_level_mha
