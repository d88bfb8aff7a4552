// The operators of split activations, as functions of what an operator is given.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace two_level_mha {

using at::Tensor;

// Raises ValueError unless it is the (n, m, i, j) of a rank.
void check_grid(at::IntArrayRef grid);

Tensor shard_activations_op(const Tensor& x, bool rows, at::IntArrayRef grid, std::string group);
Tensor gather_activations_op(const Tensor& x, c10::SymInt size, bool rows, at::IntArrayRef grid,
                             std::string group);
std::vector<Tensor> project_activations_op(const Tensor& x, at::TensorList weights,
                                           const c10::List<std::optional<Tensor>>& biases, c10::SymInt size,
                                           bool rows, at::IntArrayRef grid, std::string group,
                                           std::optional<at::ScalarType> reduce_dtype);
Tensor sum_activations_op(const Tensor& x, const std::optional<Tensor>& bias, bool rows, at::IntArrayRef grid,
                          std::string group, std::optional<at::ScalarType> reduce_dtype);

}  // namespace two_level_mha
