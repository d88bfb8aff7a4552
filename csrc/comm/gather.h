// Blocks of every rank of a group, put together: an all-gather of several tensors in one exchange.
#pragma once

#include "exchange.h"

namespace two_level_mha {

// 4-D tensors, each rank's piece of `size` along `dim` -> the whole ones, as
// unpack orders pieces (zigzag too). Adjoint: a rank gets the sum of the
// gradients of its pieces, since the ranks use the whole each in its own way.
std::vector<Tensor> gather_along(const std::vector<Tensor>& pieces, int64_t dim, const c10::SymInt& size,
                                 bool zigzag, const Group& group);

}  // namespace two_level_mha
