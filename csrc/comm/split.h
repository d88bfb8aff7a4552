// Activations that stay split over all ranks of a grid: each has its own sequences, or its own rows of every one.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../plan/call.h"
#include "exchange.h"
#include "seal.h"

namespace two_level_mha {

using at::Tensor;

// How a dim of tensors (B, 1, L, ..) is split over P = n * m ranks. Rank (i, j) has part j * n + i, so that the parts of
// a slice's ranks lie side by side. Of rows a part is chunks t and 2 P - 1 - t of 2 P, which balances causal
// attention; of sequences one of P. Chunks have ceil(size / (2 P)), or ceil(size / P), the last ones less or none.
struct Split {
  Group grid;
  int64_t head_groups, slices, part;
  int64_t dim;  // 2 rows, 0 sequences

  Split(const Group& grid, int64_t head_groups, int64_t slices, int64_t head_group, int64_t slice,
        Activations activations)
      : grid(grid),
        head_groups(head_groups),
        slices(slices),
        part(slice * head_groups + head_group),
        dim(activations == Activations::sequence ? 2 : 0) {}

  // (first, count) of this rank's chunks of `size`. A graph in which that is symbolic is of sizes whose chunks are full.
  std::vector<std::pair<c10::SymInt, c10::SymInt>> runs(const c10::SymInt& size) const;
  // What this rank has of `size`.
  c10::SymInt own(const c10::SymInt& size) const;
  // Raises ValueError unless x (B, 1, L, ..) is that.
  void check_own(const Tensor& x, const c10::SymInt& size) const;
};

// The wholes of tensors (B, 1, L, ..) of which every rank has its part, in one exchange; sizes: of the dim that is
// split. Backward: this rank's part of the gradient, which all have alike.
std::vector<Tensor> gather_split(const std::vector<Tensor>& xs, const std::vector<c10::SymInt>& sizes,
                                 const Split& split);

// This rank's part of x (B, 1, L, ..), which all ranks have alike. Backward: the parts of all.
Tensor keep_split(const Tensor& x, const Split& split);

// This rank's part of the sum of x (B, 1, L, D) over the ranks, in reduce_dtype if given, and the bias (D,). Backward:
// the parts of all, so that the bias has the same gradient on every rank. seal: what the ranks compare by it, or by an
// exchange of its own where this one does not reach all ranks.
Later<Tensor> begin_sum_split(const Tensor& x, const std::optional<Tensor>& bias, const Split& split,
                              std::optional<at::ScalarType> reduce_dtype, const std::optional<Seal>& seal);

// For autograd functions, not differentiable: the wholes; this rank's parts of the sums of xs over the ranks, and behind
// them the sums of what they compare.
Later<std::vector<Tensor>> begin_all_parts(at::TensorList xs, const std::vector<c10::SymInt>& sizes,
                                           const Split& split);
Later<std::vector<Tensor>> begin_sum_parts(std::vector<Tensor> xs, const Split& split,
                                           std::optional<at::ScalarType> reduce_dtype,
                                           const std::optional<Seal>& seal);

}  // namespace two_level_mha
