// Linears of split activations whose weights are split by columns: each rank has its columns of the products of all.
#pragma once

#include <optional>
#include <vector>

#include "split.h"

namespace two_level_mha {

// This rank's columns: weight (width, D), bias (width,).
struct Linear {
  Tensor weight;
  std::optional<Tensor> bias;
};

// x (B, L, D), this rank's part of a whole of `size` along the dim that is split -> whole W^T + b of each linear, (B, L,
// width). The whole is gathered once, and again in backward, so that only the part is kept; its gradient is summed
// over the ranks, in reduce_dtype if given, and each gets its part.
std::vector<Tensor> project_linears(const Tensor& x, const std::vector<Linear>& linears,
                                    const c10::SymInt& size, const Split& split,
                                    std::optional<at::ScalarType> reduce_dtype);

}  // namespace two_level_mha
