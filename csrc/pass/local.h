// Attention of what this rank holds, with its part of the mask and the global indices of its rows and keys.
#pragma once

#include "../attend/partial_attention.h"
#include "context.h"

#include <functional>

namespace two_level_mha {

// (q, k, v, options) -> out and, with rows at dim 2 too, a second result
using Core =
    std::function<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Attend&)>;

// The whole call's mask, broadcastable to (B, h, L, S), with four dims; its gradient becomes the sum over the grid.
// Raises ValueError, on all ranks alike, for one that does not fit.
Tensor whole_mask(Tensor mask, const Context& context);

// The first of the `heads` query heads that this rank attends with.
int64_t first_head(int64_t heads, const Context& context);

// attend.mask is a whole mask; attend.causal counts positions. scores: as `leave` has them.
std::tuple<Tensor, Tensor> attend_local(const Tensor& q, const Tensor& k, const Tensor& v, Attend attend,
                                        const std::optional<Tensor>& scores, const Context& context,
                                        const Core& core);

}  // namespace two_level_mha
