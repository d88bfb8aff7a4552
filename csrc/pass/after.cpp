#include "after.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/sigmoid.h>

#include <cmath>

#include "../base/sizes.h"
#include "local.h"

namespace two_level_mha {

After after_of(const std::optional<std::vector<Tensor>>& list, const Context& context) {
  const size_t count = list ? list->size() : 0, gates = count > 0 && list->front().dim() == 4 ? 1 : 0;
  const bool missing = context.sizes.gated && gates == 0;
  TORCH_CHECK_VALUE(!missing && count <= gates + 1, "after must be the gate, without which a gated layer (",
                    context.sizes.gated, ") is none, then perhaps sinks, got ", count, " tensors");
  After after;
  if (gates == 1) after.gate = list->front();
  if (count > gates) after.sinks = list->back();
  const auto heads = context.sizes.H * context.sizes.n;
  TORCH_CHECK_VALUE(!after.sinks || (after.sinks->dim() == 1 && fixed_size(*after.sinks, 0) == heads &&
                                     after.sinks->is_floating_point()),
                    "sinks must be floating, of shape (", heads, ",), got ", after.sinks->scalar_type(), " ",
                    after.sinks->sym_sizes());
  return after;
}

std::optional<Tensor> own_sinks(const After& after, int64_t heads, const Context& context) {
  if (!after.sinks) return std::nullopt;
  Tensor own = after.sinks->narrow(0, first_head(heads, context), heads);
  return context.row.out == Move::merge ? own - std::log(double(context.sizes.m)) : own;
}

void add_sinks(Tensor& o, Tensor& logsumexp, const std::optional<Tensor>& sinks) {
  if (!sinks) return;
  Tensor logit = sinks->to(logsumexp.scalar_type()).unsqueeze(1);
  o = (o * at::sigmoid(logsumexp - logit).unsqueeze(3)).to(o.scalar_type());
  logsumexp = at::logaddexp(logsumexp, logit);
}

Tensor with_gate(const Tensor& o, const std::optional<Tensor>& gate, const Context& context) {
  if (!gate) return o;
  TORCH_CHECK_VALUE(gate->dim() == 4 && gate->is_floating_point() &&
                        fixed_size(*gate, 1) == fixed_size(o, 1) && fixed_size(*gate, 3) == context.sizes.d,
                    "gate must be floating and lie as q does, with ", fixed_size(o, 1), " heads of ",
                    context.sizes.d, ", got ", gate->scalar_type(), " ", gate->sym_sizes());
  const auto [first, count] = context.columns();
  const bool whole = fixed_size(o, 3) == context.sizes.d;
  return o * (whole ? *gate : gate->narrow(3, first, count)).to(o.scalar_type());
}

}  // namespace two_level_mha
