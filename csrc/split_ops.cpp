#include "split_ops.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include "comm/split_linear.h"
#include "pass/context.h"

namespace two_level_mha {

namespace {

Split split_of(at::IntArrayRef grid, const std::string& group, bool rows) {
  check_grid(grid);
  const Grid of{grid[0], grid[1]};
  return {{group, of.size(), of.rank(grid[2], grid[3])},    grid[0], grid[1], grid[2], grid[3],
          rows ? Activations::sequence : Activations::batch};
}

// (B, L, ..) as (B, 1, L, N).
Tensor four_dims(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must be (B, L, ..), got ", x.dim(), " dims");
  return (x.dim() == 2 ? x.unsqueeze(2) : x.flatten(2)).unsqueeze(1);
}

// x's shape with another size of the dim that is split.
std::vector<c10::SymInt> resized(const Tensor& x, const Split& split, const c10::SymInt& size) {
  auto sizes = x.sym_sizes().vec();
  sizes[split.dim == 2 ? 1 : 0] = size;
  return sizes;
}

c10::SymInt size_of(const Tensor& x, const Split& split) {
  return x.sym_size(split.dim == 2 ? 1 : 0);
}

}  // namespace

void check_grid(at::IntArrayRef grid) {
  TORCH_CHECK_VALUE(grid.size() == 4, "grid must be (head_groups, slices, head_group, slice), got ",
                    grid.size(), " numbers");
  check_place({grid[0], grid[1]}, grid[2], grid[3]);
}

Tensor shard_activations_op(const Tensor& x, bool rows, at::IntArrayRef grid, std::string group) {
  const Split split = split_of(grid, group, rows);
  if (split.grid.size == 1) return x;
  return keep_split(four_dims(x), split).view_symint(resized(x, split, split.own(size_of(x, split))));
}

Tensor gather_activations_op(const Tensor& x, c10::SymInt size, bool rows, at::IntArrayRef grid,
                             std::string group) {
  const Split split = split_of(grid, group, rows);
  if (split.grid.size == 1) return x;
  Tensor mine = four_dims(x);
  split.check_own(mine, size);
  return gather_split({mine}, {size}, split)[0].view_symint(resized(x, split, size));
}

std::vector<Tensor> project_activations_op(const Tensor& x, at::TensorList weights,
                                           const c10::List<std::optional<Tensor>>& biases, c10::SymInt size,
                                           bool rows, at::IntArrayRef grid, std::string group,
                                           std::optional<at::ScalarType> reduce_dtype) {
  const Split split = split_of(grid, group, rows);
  TORCH_CHECK_VALUE(x.dim() == 3, "x must be (B, L, D), got ", x.dim(), " dims");
  TORCH_CHECK_VALUE(biases.size() == weights.size(), "biases must be one, or None, for each of ",
                    weights.size(), " weights, got ", biases.size());
  std::vector<Linear> linears;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::optional<Tensor> bias = biases.get(i);
    TORCH_CHECK_VALUE(weights[i].dim() == 2 && weights[i].sym_size(1) == x.sym_size(2),
                      "weights must be (width, ", x.sym_size(2), "), got ", weights[i].sym_sizes());
    TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->sym_size(0) == weights[i].sym_size(0)),
                      "biases must be as wide as their weight, ", weights[i].sym_size(0), ", got ",
                      bias ? bias->sym_sizes() : c10::SymIntArrayRef());
    linears.push_back({weights[i], bias});
  }
  split.check_own(four_dims(x), size);
  return project_linears(x, linears, size, split, reduce_dtype);
}

Tensor sum_activations_op(const Tensor& x, const std::optional<Tensor>& bias, bool rows, at::IntArrayRef grid,
                          std::string group, std::optional<at::ScalarType> reduce_dtype) {
  const Split split = split_of(grid, group, rows);
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && x.dim() == 3 && bias->sym_size(0) == x.sym_size(2)),
                    "bias must be (D,) of x (B, L, D), got ",
                    bias ? bias->sym_sizes() : c10::SymIntArrayRef());
  if (split.grid.size == 1) return bias ? x + *bias : x;
  Tensor mine = begin_sum_split(four_dims(x), bias, split, reduce_dtype, std::nullopt)();
  return mine.view_symint(resized(x, split, split.own(size_of(x, split))));
}

}  // namespace two_level_mha
