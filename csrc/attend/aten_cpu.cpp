#include "aten_cpu.h"

#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

#include "cpu_blocked.h"
#include "cpu_problem.h"

namespace two_level_mha {

namespace {

// Every row sees every key, as far as causal says.
bool sees_all(const AttentionParams& params, int64_t S) {
  return !params.causal || params.keys_of(0, S).end == S;
}

// (B, H, L, D) in memory (B, L, H, D), which is how ATen's results lie already.
Tensor as_rows(const Tensor& x) {
  return x.transpose(1, 2).contiguous().transpose(1, 2);
}

}  // namespace

bool aten_cpu_fits(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  const bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  if (!q.is_cpu() || !half || q.numel() == 0 || k.numel() == 0 || v.size(3) != q.size(3)) return false;
  // Masks may leave a row without keys, or with none but finite biases.
  if (params.mask.defined() || params.window || params.softcap > 0 || params.dropout_p > 0) return false;
  return sees_all(params, k.size(2)) || (*params.causal == 0 && params.key_stride == 1);
}

bool aten_cpu_supports(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  // ATen packs, and multiplies packed blocks, where the CPU has AMX for this type.
  return at::native::cpublas::could_pack(q.scalar_type()) && aten_cpu_fits(q, k, v, params);
}

Forward aten_cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      with_rows(q), with_rows(k), with_rows(v), 0.0, !sees_all(params, k.size(2)), std::nullopt,
      params.scale);
  return {as_rows(out), logsumexp.contiguous()};
}

Backward aten_cpu_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                           const AttentionParams& params) {
  if (grad_logsumexp.defined())  // ATen's has no gradient
    return blocked_backward(grad_out, grad_logsumexp, q, k, v, out, logsumexp, params);
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      with_rows(grad_out), with_rows(q), with_rows(k), with_rows(v), out, logsumexp, 0.0,
      !sees_all(params, k.size(2)), std::nullopt, params.scale);
  return {as_rows(dq), as_rows(dk), as_rows(dv), Tensor()};
}

}  // namespace two_level_mha
