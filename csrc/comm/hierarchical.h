// The paper's hierarchical concatenation: blocks gathered axis after axis.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "group.h"
#include "seal.h"

namespace two_level_mha {

using at::Tensor;

// A dim of a block that is gathered over one axis.
struct GatherStage {
  int64_t dim;
  Group group;
};

// (.., local, ..) -> (.., local * group.size, ..) for the dim of every stage; stages
// of the same dim lie in it in their order. reversed: the last stage is gathered
// first. Heads before slices moves m times less between nodes. replicated: every rank
// uses the result alike, so the adjoint is its own block; otherwise a reduce-scatter.
// seal: what the ranks compare by it (seal.h).
Tensor hierarchical_all_gather(const Tensor& x, const std::vector<GatherStage>& stages, bool reversed,
                               bool replicated, const std::optional<Seal>& seal = std::nullopt);

}  // namespace two_level_mha
