// Tensors that are the same on every rank: sums that give
// them, and their way into what differs between ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "exchange.h"
#include "seal.h"

namespace two_level_mha {

using at::Tensor;

// y = sum of x over the ranks, in reduce_dtype if given, the same bits on every rank: those of the sum. What each
// rank makes of it alone has them only where all run the same kernels (docs/training.md). Over two axes: a
// reduce-scatter along the first, an all-reduce along the second, an all-gather along the first, or one flat
// all-reduce: plan/traffic.h says which.
// own: nobody else needs x, which may be written to.
Tensor sum_over(const Tensor& x, const SumGroups& groups, std::optional<at::ScalarType> reduce_dtype,
                bool own = false);
// Of stages the first is begun, the others follow when it is waited for.
Later<Tensor> begin_sum_over(const Tensor& x, const SumGroups& groups,
                             std::optional<at::ScalarType> reduce_dtype, bool own);

// Forward: the sum. Backward: identity, since y and so its gradient are the same on every rank. seal: what the
// ranks compare by it (seal.h).
Later<Tensor> begin_reduce_replicated(const Tensor& x, const SumGroups& groups,
                                      std::optional<at::ScalarType> reduce_dtype,
                                      const std::optional<Seal>& seal);
Tensor reduce_replicated(const Tensor& x, const SumGroups& groups,
                         std::optional<at::ScalarType> reduce_dtype);

// Forward: identity, the tensors are the same on every rank. Backward: the sum, in one exchange for all.
std::vector<Tensor> enter_replicated(const std::vector<Tensor>& xs, const SumGroups& groups,
                                     std::optional<at::ScalarType> reduce_dtype);

}  // namespace two_level_mha
