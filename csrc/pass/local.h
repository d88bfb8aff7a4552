// Attention of what this rank holds, with its part of the mask and the global indices of its rows and keys.
#pragma once

#include "../attend/partial_attention.h"
#include "context.h"

#include <functional>

namespace two_level_mha {

// (q, k, v, options) -> out and, with rows at dim 2 too, a second result
using Core =
    std::function<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Attend&)>;

// attend.mask is the whole call's, broadcastable to (B, h, L, S); attend.causal counts positions.
std::tuple<Tensor, Tensor> attend_local(const Tensor& q, const Tensor& k, const Tensor& v, Attend attend,
                                        const Context& context, const Core& core);

}  // namespace two_level_mha
