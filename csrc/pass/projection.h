// The local projections: a rank's own weight blocks, no exchange.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace two_level_mha {

using at::Tensor;

// Weight blocks of one rank. Weights (heads, E, D), biases (heads, E), each of which may be absent.
struct QkvWeights {
  Tensor q, k, v;
  std::optional<Tensor> q_bias, k_bias, v_bias;
};

// query (B, L, Dq), key (B, S, Dk), value (B, S, Dv); with batch_first = false the first two dims are
// swapped.
// -> q (B, H, L, E), k (B, K, S, E), v (B, K, S, E), views of memory ordered as the inputs were.
std::tuple<Tensor, Tensor, Tensor> qkv_projection(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const QkvWeights& weights, bool batch_first);

// o (B, H, L, E) -> (B, L, D) by out_weight (D, H, E); the bias may be absent.
Tensor out_projection(const Tensor& o, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace two_level_mha
