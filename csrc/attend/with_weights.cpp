#include "with_weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>

#include "../base/sizes.h"
#include "hide.h"

#include <cmath>
#include <limits>

namespace two_level_mha {

namespace {

Tensor masked(Tensor scores, const Attend& attend) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (attend.mask) {
    const Tensor& mask = *attend.mask;
    // Added, not filled in, so that the NaN of a row without keys reaches the gradients, as in stock.
    scores = scores + (mask.scalar_type() == at::kBool
                           ? at::zeros({1}, scores.options()).masked_fill(mask.logical_not(), -kInfinity)
                           : mask);
  }
  return hide(scores, {attend.causal, attend.window, attend.key_stride});
}

}  // namespace

std::tuple<Tensor, Tensor> attention_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Attend& attend, const std::optional<Tensor>& sinks) {
  // under autocast the products below cast, so that a model's rotary may have widened q and k
  check_attention(attend, q, k.to(q.scalar_type()), v.to(q.scalar_type()));
  const int64_t groups = fixed_size(q, 1) / fixed_size(k, 1);
  auto every_head = [&](const Tensor& x) { return groups == 1 ? x : x.repeat_interleave(groups, 1); };
  Tensor scores = at::matmul(q, every_head(k).transpose(-1, -2)) *
                  attend.scale.value_or(1.0 / std::sqrt(double(fixed_size(q, 3))));
  if (attend.softcap > 0.0) scores = at::tanh(scores / attend.softcap) * attend.softcap;
  scores = masked(scores, attend);
  if (sinks) {
    std::vector<c10::SymInt> sizes = scores.sym_sizes().vec();
    sizes[3] = 1;
    Tensor column = sinks->to(scores.scalar_type()).view({1, -1, 1, 1}).expand_symint(sizes);
    scores = at::cat({scores, column}, 3);
  }
  Tensor weights = at::softmax(scores, -1);
  if (sinks) weights = weights.narrow_symint(3, 0, k.sym_size(2));
  if (attend.dropout_p > 0.0) {
    std::vector<c10::SymInt> sizes = weights.sym_sizes().vec();
    Tensor keep = dropout_keep_mask(*attend.seed, attend.dropout_p, sizes, attend.origin);
    weights = attend.dropout_p < 1.0 ? weights * keep.to(weights.scalar_type()) / (1.0 - attend.dropout_p)
                                     : weights * 0.0;
  }
  weights = weights.to(v.scalar_type());
  return {at::matmul(weights, every_head(v)), weights};
}

}  // namespace two_level_mha
