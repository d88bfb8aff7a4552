// Exchanges of two ranks at a time, by messages: how Gloo uses both ways of a link at once.
//
// Gloo's own all_to_all and all_gather post a send before its receive. What a rank tells its peer then, that it may send,
// waits behind all that the rank sends itself, so that the two ways of the link take turns. Here every receive is
// posted before the first send.
#pragma once

#include <ATen/core/Tensor.h>

#include "group.h"

namespace two_level_mha {

using at::Tensor;

// Whether these exchanges serve the tensor in the group: on the CPU, by Gloo. The same on every rank of it.
bool has_pairs(const Tensor& x, const Group& group);

// What "_c10d_functional::all_to_all_single" is given, and gives: to be waited for. Not differentiable.
Tensor all_to_all_pairs(const Tensor& x, const std::vector<int64_t>& received,
                        const std::vector<int64_t>& sent, const Group& group);

// The same of "_c10d_functional::all_gather_into_tensor". Between nodes a ring sends less over their link, but of two
// ranks.
Tensor all_gather_pairs(const Tensor& x, const Group& group);

}  // namespace two_level_mha
