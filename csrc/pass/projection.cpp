#include "projection.h"

#include <ATen/ATen.h>

#include "../base/sizes.h"

namespace two_level_mha {

namespace {

// From this many tokens on one GEMM over concatenated weights beats three, each of which reads X again; below
// it the copy of the weights costs more than it saves.
constexpr int64_t kOneGemmTokens = 256;

bool many_tokens(const Tensor& x) {
  auto tokens = (x.sym_size(0) * x.sym_size(1)).maybe_as_int();
  return !tokens || *tokens >= kOneGemmTokens;
}

// (B, L, heads * E) -> (B, heads, L, E); (L, B, ..) when not batch_first
Tensor split_heads(const Tensor& x, int64_t heads, bool batch_first) {
  Tensor parts = x.unflatten(-1, {heads, fixed_size(x, -1) / heads});
  return batch_first ? parts.transpose(1, 2) : parts.permute({1, 2, 0, 3});
}

std::optional<Tensor> flat(const std::optional<Tensor>& bias) {
  return bias ? std::optional<Tensor>(bias->reshape(-1)) : std::nullopt;
}

Tensor project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool batch_first) {
  return split_heads(at::linear(x, weight.flatten(0, 1), flat(bias)), fixed_size(weight, 0), batch_first);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> qkv_projection(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const QkvWeights& weights, bool batch_first) {
  const QkvWeights& w = weights;
  const bool same = query.is_same(key) && key.is_same(value);
  const bool alike =
      w.q_bias.has_value() == w.k_bias.has_value() && w.q_bias.has_value() == w.v_bias.has_value();
  if (!same || !alike || !many_tokens(query))
    return {project(query, w.q, w.q_bias, batch_first), project(key, w.k, w.k_bias, batch_first),
            project(value, w.v, w.v_bias, batch_first)};
  Tensor weight = at::cat({w.q.flatten(0, 1), w.k.flatten(0, 1), w.v.flatten(0, 1)});
  std::optional<Tensor> bias;
  if (w.q_bias) bias = at::cat({w.q_bias->reshape(-1), w.k_bias->reshape(-1), w.v_bias->reshape(-1)});
  Tensor qkv = at::linear(query, weight, bias);
  const int64_t q_width = fixed_size(w.q, 0) * fixed_size(w.q, 1),
                kv_width = fixed_size(w.k, 0) * fixed_size(w.k, 1);
  return {split_heads(qkv.narrow(-1, 0, q_width), fixed_size(w.q, 0), batch_first),
          split_heads(qkv.narrow(-1, q_width, kv_width), fixed_size(w.k, 0), batch_first),
          split_heads(qkv.narrow(-1, q_width + kv_width, kv_width), fixed_size(w.v, 0), batch_first)};
}

Tensor out_projection(const Tensor& o, const Tensor& weight, const std::optional<Tensor>& bias) {
  return at::linear(o.transpose(1, 2).flatten(2), weight.flatten(1), bias);
}

}  // namespace two_level_mha
