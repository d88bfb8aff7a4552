// Merging attention over parts of the keys: each part brings its output and its logsumexp.
//
//   logsumexp = log(sum_p exp(logsumexp_p)),   out = sum_p exp(logsumexp_p - logsumexp) out_p
//
// A part that saw no key has logsumexp_p = -inf and adds nothing, whatever its out holds; a row that no part
// saw gets out = 0 and logsumexp = -inf.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace two_level_mha {

// outs (parts, B, H, L, Dv), logsumexps (parts, B, H, L), float32, or float64 with float64 outs, in which the
// sums are taken -> out (B, H, L, Dv) in the dtype of outs, logsumexp (B, H, L).
// The op: differentiable, any device.
std::tuple<at::Tensor, at::Tensor> merge_partials(const at::Tensor& outs, const at::Tensor& logsumexps);

std::tuple<at::Tensor, at::Tensor> merge_partials_cpu(const at::Tensor& outs, const at::Tensor& logsumexps);
std::tuple<at::Tensor, at::Tensor> merge_partials_cuda(const at::Tensor& outs, const at::Tensor& logsumexps);

}  // namespace two_level_mha
