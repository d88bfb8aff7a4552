// Entering the pass with activations that are split over the grid (comm/split.h).
#pragma once

#include "context.h"
#include "inputs.h"
#include "projection.h"

namespace two_level_mha {

// This rank's parts (B, length, D), or with batch and length swapped -> whole inputs, batch first, that every rank uses
// alike: the gradient is this rank's part of the whole's.
std::vector<Tensor> whole_inputs(const Inputs& inputs, const Context& context);

// This rank's parts -> q, k, v of all tokens, or where the call takes parts of those of this rank's slice, by the weights
// given, as qkv_projection gives them batch first. The parts alone are kept for the backward pass, which gathers them
// once more where weights are trained.
std::tuple<Tensor, Tensor, Tensor> project_split(const Inputs& inputs, const QkvWeights& weights,
                                                 const Context& context);

}  // namespace two_level_mha
