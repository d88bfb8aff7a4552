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

// Whether they serve the tensor in the group, by the operators _all_to_all_pairs and _all_gather_pairs: on the CPU, by
// Gloo. The same on every rank of it.
bool has_pairs(const Tensor& x, const Group& group);

}  // namespace two_level_mha
