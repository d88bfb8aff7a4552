// Sums over the whole grid, and the paper's hierarchical concatenation.
#pragma once

#include "../move/exchange.h"

#include <optional>

namespace two_level_mha {

// y = sum of x over the grid, the same bits on every rank: reduce-scatter over the slices, all-reduce over
// the head groups, all-gather over the slices, or one flat all-reduce: traffic.h says which.
Tensor sum_over_grid(const Tensor& x, const Groups& groups, std::optional<at::ScalarType> reduce_dtype);

// Forward: the sum over the grid. Backward: identity, since y and so its gradient are the same on every rank.
Tensor reduce_replicated(const Tensor& x, const Groups& groups, std::optional<at::ScalarType> reduce_dtype);

// Forward: identity, the tensors are the same on every rank. Backward: the sum over the grid, in one exchange
// for all.
std::vector<Tensor> enter_replicated(const std::vector<Tensor>& xs, const Groups& groups,
                                     std::optional<at::ScalarType> reduce_dtype);

// (.., local, ..) -> (.., local * n, .., local * m, ..): `head_dim` of x is gathered over the head axis,
// `slice_dim` over the slice axis. slices_first: the order of the two stages; heads first moves m times less
// between nodes. replicated: every rank uses the result alike, so the adjoint is its own block; otherwise a
// reduce-scatter.
Tensor hierarchical_all_gather(const Tensor& x, int64_t head_dim, int64_t slice_dim, const Groups& groups,
                               bool slices_first, bool replicated);

}  // namespace two_level_mha
