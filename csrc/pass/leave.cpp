#include <ATen/ATen.h>

#include "../attend/with_weights.h"
#include "../comm/hierarchical.h"
#include "../comm/replicated.h"
#include "attention_weights.h"
#include "gathered_weights.h"
#include "local.h"
#include "move.h"
#include "pass.h"
#include "tokens.h"

namespace two_level_mha {

namespace {

// The paper's concatenation: O of all slices and heads (B, h, L, d).
Tensor concatenate_heads(const Tensor& o, const Context& context) {
  const Groups& groups = context.groups;
  if (!context.sizes.whole_heads)
    return hierarchical_all_gather(o, {{1, groups.head}, {3, groups.slice}}, /*reversed=*/false,
                                   /*replicated=*/true, context.seal);
  return hierarchical_all_gather(o.unsqueeze(1), {{1, groups.head}, {2, groups.slice}}, false, true,
                                 context.seal)
      .flatten(1, 2);
}

// O -> Y, the output projection and the sum over the ranks, or the concatenation and all of the projection.
Tensor combine(Tensor o, const OutWeights& out, const Context& context) {
  // before the copy that projecting makes
  const bool swap = !context.batch_first && !context.shards_y() && !context.splits();
  if (swap) o = o.transpose(0, 2);
  Tensor y;
  if (context.sizes.concat) {
    y = out_projection(concatenate_heads(o, context), out.weight, out.bias);
  } else if (context.grid.size() == 1) {
    y = out_projection(o, out.weight, out.bias);
  } else if (context.takes_parts) {
    y = out_projection(o, gather_out_weight(out.weight, context), std::nullopt).unsqueeze(1);
    y = sum_split(y, std::nullopt, context.head_split(), context.reduce_dtype, context.seal).squeeze(1);
    if (out.bias)
      y = y + enter_replicated({*out.bias}, over_grid(context.groups), context.reduce_dtype)[0].to(
                  y.scalar_type());
  } else if (context.splits() && !context.shards_y()) {
    y = sum_split(out_projection(o, out.weight, std::nullopt).unsqueeze(1), out.bias, context.split(),
                  context.reduce_dtype, context.seal);
    y = y.squeeze(1);
  } else {
    y = context.shards_y()
            ? reduce_sharded(out_projection(o, gather_out_weight(out.weight, context), std::nullopt), context)
            : reduce_replicated(out_projection(o, out.weight, std::nullopt), over_grid(context.groups),
                                context.reduce_dtype, context.seal);
    if (out.bias) y = y + out.bias->to(y.scalar_type());
  }
  if (context.splits() && (context.sizes.concat || (context.shards_y() && !context.takes_parts)))
    y = keep_split(y.unsqueeze(1), context.split()).squeeze(1);
  return context.batch_first || swap ? y : y.transpose(0, 1).contiguous();
}

// The context with all that must be alike on every rank in its seal.
Context sealed(Context context, const Attend& attend, const OutWeights& out) {
  if (!context.seal) return context;
  Facts facts;
  facts.add(attend.mask);
  facts.add(attend.scale);
  facts.add(attend.softcap);
  facts.add(attend.dropout_p);
  facts.add(attend.seed);
  for (const auto* number : {&attend.causal, &attend.window}) facts.add(*number);
  for (const auto* number :
       {&context.sizes.B, &context.sizes.L, &context.sizes.S, &context.sizes.position, &context.first_key})
    facts.add(*number);
  facts.add(out.bias);
  context.seal->hash = facts.hash(context.seal->hash);
  return context;
}

// The keys and values that the call attends to.
std::pair<Tensor, Tensor> seen_by(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend,
                                  const Context& context, CacheLayer* cache) {
  if (cache == nullptr) return {k, v};
  const bool for_gradients = q.requires_grad() || (attend.mask && attend.mask->requires_grad());
  return cache->append(k, v, context.sizes.moved_keys(), for_gradients);
}

}  // namespace

Tensor leave(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend, const OutWeights& out,
             const Context& call, CacheLayer* cache) {
  const Context context = sealed(call, attend, out);
  const auto [keys, values] = seen_by(q, k, v, attend, context, cache);
  check_layout(q, keys, values, context);
  auto [o, logsumexp] = attend_local(q, keys, values, attend, context, partial_attention);
  const bool partial = context.row.out == Move::merge;
  return combine(partial ? merge_out(o, logsumexp, context) : move_out(o, context), out, context);
}

std::tuple<Tensor, Tensor> leave_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Attend& attend, const OutWeights& out,
                                              const Context& call, bool average) {
  const Context context = sealed(call, attend, out);
  check_layout(q, k, v, context);
  TORCH_CHECK_VALUE(context.row.out != Move::merge,
                    "attention weights are not available with scheme 'position'");
  auto [o, weights] = attend_local(q, k, v, attend, context, attention_with_weights);
  return {combine(move_out(o, context), out, context), gather_weights(weights, context, average)};
}

}  // namespace two_level_mha
