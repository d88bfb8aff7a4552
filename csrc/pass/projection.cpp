#include "projection.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>

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
  Tensor parts = x.view_symint({x.sym_size(0), x.sym_size(1), heads, fixed_size(x, -1) / heads});
  return batch_first ? parts.transpose(1, 2) : parts.permute({1, 2, 0, 3});
}

void check_weight(const char* name, const Tensor& weight, const char* shape, int64_t heads_dim) {
  TORCH_CHECK_VALUE(weight.dim() == 3 && fixed_size(weight, heads_dim) > 0, name, " must be ", shape,
                    " with at least one head, got ", weight.sym_sizes());
}

void check_bias(const char* name, const std::optional<Tensor>& bias) {
  TORCH_CHECK_VALUE(!bias || bias->dim() == 2, name, " must be (heads, E), got ", bias->sym_sizes());
}

// Dims `dim` and the next as one. Weights are views of what is stored: one call in place of flatten's three.
Tensor merged(const Tensor& x, int64_t dim) {
  auto sizes = x.sym_sizes().vec();
  sizes[dim] = sizes[dim] * sizes[dim + 1];
  sizes.erase(sizes.begin() + dim + 1);
  return x.is_contiguous() ? x.view_symint(sizes) : x.reshape_symint(sizes);
}

std::optional<Tensor> flat(const std::optional<Tensor>& bias) {
  return bias ? std::optional<Tensor>(merged(*bias, 0)) : std::nullopt;
}

Tensor project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool batch_first) {
  return split_heads(at::linear(x, merged(weight, 0), flat(bias)), fixed_size(weight, 0), batch_first);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> qkv_projection(const Tensor& query, const Tensor& key, const Tensor& value,
                                                  const QkvWeights& weights, bool batch_first) {
  const QkvWeights& w = weights;
  check_weight("q_weight", w.q, "(heads, E, D)", 0);
  check_weight("k_weight", w.k, "(heads, E, D)", 0);
  check_weight("v_weight", w.v, "(heads, E, D)", 0);
  check_bias("q_bias", w.q_bias);
  check_bias("k_bias", w.k_bias);
  check_bias("v_bias", w.v_bias);
  const bool same = query.is_same(key) && key.is_same(value);
  const bool alike =
      w.q_bias.has_value() == w.k_bias.has_value() && w.q_bias.has_value() == w.v_bias.has_value();
  if (!same || !alike || !many_tokens(query))
    return {project(query, w.q, w.q_bias, batch_first), project(key, w.k, w.k_bias, batch_first),
            project(value, w.v, w.v_bias, batch_first)};
  Tensor weight = at::cat({merged(w.q, 0), merged(w.k, 0), merged(w.v, 0)});
  std::optional<Tensor> bias;
  if (w.q_bias) bias = at::cat({merged(*w.q_bias, 0), merged(*w.k_bias, 0), merged(*w.v_bias, 0)});
  Tensor qkv = at::linear(query, weight, bias);
  const int64_t q_width = fixed_size(w.q, 0) * fixed_size(w.q, 1),
                kv_width = fixed_size(w.k, 0) * fixed_size(w.k, 1);
  return {split_heads(qkv.narrow(-1, 0, q_width), fixed_size(w.q, 0), batch_first),
          split_heads(qkv.narrow(-1, q_width, kv_width), fixed_size(w.k, 0), batch_first),
          split_heads(qkv.narrow(-1, q_width + kv_width, kv_width), fixed_size(w.v, 0), batch_first)};
}

Tensor out_projection(const Tensor& o, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_weight("out_weight", weight, "(D, heads, E)", 1);
  return at::linear(o.transpose(1, 2).flatten(2), merged(weight, 1), bias);
}

}  // namespace two_level_mha
