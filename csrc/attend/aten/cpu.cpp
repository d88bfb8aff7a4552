#include "cpu.h"

#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

#include "../rows.h"

namespace two_level_mha {

namespace {

// ATen's causal mask starts in the top-left corner.
bool is_causal(const AttentionParams& params, int64_t S) {
  return params.keys_of(0, S).end != S;
}

}  // namespace

Forward aten_cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      with_rows(q), with_rows(k), with_rows(v), 0.0, is_causal(params, k.size(2)), std::nullopt,
      params.scale);
  return {as_rows(out), logsumexp.contiguous()};
}

Backward aten_cpu_backward(const Tensor& grad_out, const Tensor&, const Tensor& q, const Tensor& k,
                           const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                           const AttentionParams& params) {
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      with_rows(grad_out), with_rows(q), with_rows(k), with_rows(v), out, logsumexp, 0.0,
      is_causal(params, k.size(2)), std::nullopt, params.scale);
  return {as_rows(dq), as_rows(dk), as_rows(dv), Tensor()};
}

}  // namespace two_level_mha
