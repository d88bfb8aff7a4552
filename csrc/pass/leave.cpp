#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include "../attend/with_weights.h"
#include "../base/sizes.h"
#include "../comm/hierarchical.h"
#include "../comm/replicated.h"
#include "attention_weights.h"
#include "chunks.h"
#include "gathered_weights.h"
#include "halves.h"
#include "local.h"
#include "move.h"
#include "pass.h"
#include "tokens.h"

namespace two_level_mha {

namespace {

// The paper's concatenation: O of all slices and heads (B, h, L, d).
Tensor concatenate_heads(const Tensor& o, const Context& context) {
  const Groups& groups = context.groups;
  if (!context.sizes.whole_heads) {
    const Tensor all = hierarchical_all_gather(filled(o, 3, context), {{1, groups.head}, {3, groups.slice}},
                                               /*reversed=*/false, /*replicated=*/true, context.seal);
    return fixed_size(all, 3) == context.sizes.d ? all : all.narrow(3, 0, context.sizes.d);
  }
  return hierarchical_all_gather(o.unsqueeze(1), {{1, groups.head}, {2, groups.slice}}, false, true,
                                 context.seal)
      .flatten(1, 2);
}

// O -> Y, the output projection and the sum over the ranks, or the concatenation and all of the projection.
Later<Tensor> begin_combine(Tensor o, const OutWeights& out, const Context& context) {
  // before the copy that projecting makes
  const bool swap = !context.batch_first && !context.shards_y() && !context.splits();
  if (swap) o = o.transpose(0, 2);
  auto of = [](const Tensor& y) -> Later<Tensor> { return [=] { return y; }; };
  Later<Tensor> coming;
  std::optional<Tensor> bias;  // that is to be added
  if (context.sizes.concat) {
    coming = of(out_projection(concatenate_heads(o, context), out.weight, out.bias));
  } else if (context.grid.size() == 1) {
    coming = of(out_projection(o, out.weight, out.bias));
  } else if (context.takes_parts) {
    Tensor y = out_projection(o, gather_out_weight(out.weight, context), std::nullopt).unsqueeze(1);
    coming = begin_sum_split(y, std::nullopt, context.head_split(), context.reduce_dtype, context.seal);
    if (out.bias) bias = enter_replicated({*out.bias}, over_grid(context.groups), context.reduce_dtype)[0];
  } else if (context.splits() && !context.shards_y()) {
    coming = begin_sum_split(out_projection(o, out.weight, std::nullopt).unsqueeze(1), out.bias,
                             context.split(), context.reduce_dtype, context.seal);
  } else {
    coming = context.shards_y()
                 ? of(reduce_sharded(out_projection(o, gather_out_weight(out.weight, context), std::nullopt),
                                     context))
                 : begin_reduce_replicated(out_projection(o, out.weight, std::nullopt),
                                           over_grid(context.groups), context.reduce_dtype, context.seal);
    bias = out.bias;
  }
  return then(coming, [=](Tensor y) {
    if (y.dim() == 4) y = y.squeeze(1);
    if (bias) y = y + bias->to(y.scalar_type());
    if (context.splits() && (context.sizes.concat || (context.shards_y() && !context.takes_parts)))
      y = keep_split(y.unsqueeze(1), context.split()).squeeze(1);
    return context.batch_first || swap ? y : y.transpose(0, 1).contiguous();
  });
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

// The call's options with its mask as `attend_local` takes it.
Attend with_whole_mask(Attend attend, const Context& context) {
  if (attend.mask) attend.mask = whole_mask(*attend.mask, context);
  return attend;
}

// Of every chunk its part of x (B or 1, ..), which may be absent, and of one sequence is for all.
std::vector<std::optional<Tensor>> of_chunks(const std::optional<Tensor>& x, const Chunking& chunks) {
  std::vector<std::optional<Tensor>> found(chunks.count, x);
  if (!x || x->sym_size(0) == 1) return found;
  const auto parts = in_chunks(*x, 0, chunks);
  found.assign(parts.begin(), parts.end());
  return found;
}

// The keys and values that the call attends to.
std::pair<Tensor, Tensor> seen_by(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend,
                                  const Context& context, CacheLayer* cache) {
  if (cache == nullptr) return {k, v};
  const bool for_gradients = q.requires_grad() || (attend.mask && attend.mask->requires_grad());
  return cache->append(k, v, context.sizes.moved_keys(), for_gradients);
}

}  // namespace

Leaving::Leaving(const Attend& attend, const OutWeights& out, const std::optional<Tensor>& sinks,
                 const Context& context)
    : out_(out),
      sinks_(sinks),
      context_(sealed(context, attend, out)),
      chunks_(context.leave_chunks()),
      attend_(with_whole_mask(attend, context)),
      masks_(of_chunks(attend_.mask, chunks_)) {}

void Leaving::operator()(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& gate,
                         const std::optional<Tensor>& scores) {
  const int64_t c = moving_.size();
  const Context chunk = context_.of_chunk(chunks_, c);
  Attend options = attend_;
  options.mask = masks_[c];
  auto [o, logsumexp] = attend_local(q, k, v, options, scores, chunk, partial_attention);
  add_sinks(o, logsumexp, sinks_);
  moving_.push_back(begin_move_out(with_gate(o, gate, context_), chunk));
  const int64_t behind = moves_out(context_) ? 1 : 0;  // a chunk moves while the next is attended to
  if (c >= behind) combine();
}

bool Leaving::advance() {
  bool more = false;
  for (const auto& sum : combining_) more |= sum.advance();
  return more;
}

void Leaving::combine() {
  advance();
  const int64_t c = combining_.size();
  combining_.push_back(begin_combine(arrived(moving_[c]), out_, context_.of_chunk(chunks_, c)));
}

Tensor Leaving::finish() {
  if (combining_.size() < moving_.size()) combine();
  while (advance()) continue;
  std::vector<Tensor> ys;
  for (auto& later : combining_) ys.push_back(arrived(later));
  return from_chunks(ys, context_.batch_first ? 0 : 1, chunks_);
}

Tensor leave(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend,
             const std::optional<Tensor>& scores, const OutWeights& out, const After& after,
             const Context& call, CacheLayer* cache) {
  const auto [keys, values] = seen_by(q, k, v, attend, call, cache);
  check_layout(q, keys, values, call);
  const auto sinks = own_sinks(after, fixed_size(q, 1), call);
  if (call.row.out == Move::merge) {
    const Context context = sealed(call, attend, out);
    auto [o, logsumexp] =
        attend_local(q, keys, values, with_whole_mask(attend, context), scores, context, partial_attention);
    add_sinks(o, logsumexp, sinks);
    return begin_combine(merge_out(with_gate(o, after.gate, context), logsumexp, context), out, context)();
  }
  const Chunking here{call.leave_chunks().count, 1};  // a chunk has as many sequences of each rank
  const auto qs = in_chunks(q, 0, here), ks = in_chunks(keys, 0, here), vs = in_chunks(values, 0, here);
  const auto gates = of_chunks(after.gate, here), added = of_chunks(scores, here);
  Leaving leaving(attend, out, sinks, call);
  for (int64_t c = 0; c < here.count; ++c) leaving(qs[c], ks[c], vs[c], gates[c], added[c]);
  return leaving.finish();
}

std::tuple<Tensor, Tensor> leave_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Attend& attend, const std::optional<Tensor>& scores,
                                              const OutWeights& out, const After& after, const Context& call,
                                              bool average) {
  const Context context = sealed(call, attend, out);
  check_layout(q, k, v, context);
  TORCH_CHECK_VALUE(context.row.out != Move::merge,
                    "attention weights are not available with scheme 'position'");
  const auto sinks = own_sinks(after, fixed_size(q, 1), context);
  auto core = [&](const Tensor& q, const Tensor& k, const Tensor& v, const Attend& options) {
    return attention_with_weights(q, k, v, options, sinks);
  };
  auto [o, weights] = attend_local(q, k, v, with_whole_mask(attend, context), scores, context, core);
  o = with_gate(o, after.gate, context);
  Tensor y = begin_combine(begin_move_out(o, context)(), out, context)();
  return {y, gather_weights(weights, context, average)};
}

}  // namespace two_level_mha
