#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include "../comm/gather.h"
#include "../comm/replicated.h"
#include "gathered_weights.h"
#include "halves.h"
#include "move.h"
#include "pass.h"
#include "tokens.h"

namespace two_level_mha {

namespace {

// The tokens of this rank through whole weights: nothing moves but
// the weights, and the keys and values where the rows are sharded.
std::tuple<Tensor, Tensor, Tensor> project_tokens(Inputs inputs, const QkvWeights& weights,
                                                  const ExtraKeys& extra, const Context& context) {
  const auto [whole, whole_extra] = gather_qkv_weights(weights, extra, context);
  const auto keys = context.sizes.given_keys();
  Tensor q, k, v;
  if (context.takes_parts) {
    std::tie(q, k, v) = GridProjection(inputs, whole, context, {})(0);
  } else {
    if (context.splits())
      inputs.distinct = whole_inputs(inputs, context);
    else if (!context.batch_first)
      for (Tensor& x : inputs.distinct) x = x.transpose(0, 1);
    inputs.distinct = enter_sharded(inputs.distinct, context);
    std::tie(q, k, v) = qkv_projection(inputs.query(), inputs.key(), inputs.value(), whole, true);
  }
  if (context.row.k == Move::replicate) {
    auto rows = gather_along({k, v}, 2, keys, context.zigzag(), context.groups.slice);
    k = rows[0], v = rows[1];
  }
  return {q, with_extra_keys(k, whole_extra.bias_k, extra.zero),
          with_extra_keys(v, whole_extra.bias_v, extra.zero)};
}

// All tokens through this rank's blocks, then into the layout of attention: in chunks of the batch, of which one moves
// while the next is projected.
std::tuple<Tensor, Tensor, Tensor> project_and_move(Inputs inputs, const QkvWeights& weights,
                                                    const ExtraKeys& extra, const Context& context) {
  if (context.grid.size() == 1) {
    auto [q, k, v] =
        qkv_projection(inputs.query(), inputs.key(), inputs.value(), weights, context.batch_first);
    return {q, with_extra_keys(k, extra.bias_k, extra.zero), with_extra_keys(v, extra.bias_v, extra.zero)};
  }
  const Chunking chunks = context.enter_chunks();
  const GridProjection projection(inputs, weights, context, chunks);
  std::vector<Later<std::vector<Tensor>>> moving;
  for (int64_t c = 0; c < chunks.count; ++c) moving.push_back(begin_enter(projection, c, extra, context));
  std::array<std::vector<Tensor>, 3> moved;
  for (auto& later : moving) {
    const std::vector<Tensor> chunk = arrived(later);
    for (size_t i = 0; i < 3; ++i) moved[i].push_back(chunk[i]);
  }
  const Chunking here{chunks.count, 1};  // a chunk has as many sequences of each rank
  return {from_chunks(moved[0], 0, here), from_chunks(moved[1], 0, here), from_chunks(moved[2], 0, here)};
}

// What must be alike on every rank of the call, as far as it goes in here.
Tensor seal_of(const Inputs& inputs, const std::vector<Tensor>& rows, const std::vector<Tensor>& shared,
               const Context& context) {
  Facts facts;
  facts.add(context.number);
  facts.add(context.groups.grid.layer);
  facts.add(context.row.scheme);
  facts.add(at::GradMode::is_enabled());
  for (size_t which : inputs.at) facts.add(which);
  for (const Tensor& x : inputs.distinct)
    if (context.splits())
      facts.add(at::empty({0}, x.options())), facts.add(x.requires_grad());  // each rank has its own content
    else
      facts.add(x);
  for (const auto* tensors : {&rows, &shared})
    for (const Tensor& x : *tensors) facts.add(x);
  return context.seal ? facts.hash(context.seal->hash) : facts.hash();
}

void shard_token_rows(const std::vector<Tensor>& xs, const Context& context, Entered& entered) {
  for (const Tensor& x : xs) {
    const bool one_for_all = context.sharded_dim() == 0 && x.sym_size(0) == 1;
    entered.q_rows.push_back(one_for_all ? x : shard(x, context));
    entered.k_rows.push_back(context.row.k == Move::cyclic
                                 ? own_positions(x, 2, context.sizes.position, context)
                             : context.row.k == Move::batch && !one_for_all ? shard(x, context)
                                                                            : x);
  }
}

}  // namespace

Later<std::vector<Tensor>> begin_enter(const GridProjection& projection, int64_t c, const ExtraKeys& extra,
                                       const Context& context) {
  auto [q, k, v] = projection(c);
  return begin_move_in(
      {q, with_extra_keys(k, extra.bias_k, extra.zero), with_extra_keys(v, extra.bias_v, extra.zero)},
      context);
}

Entered enter_beside(const Inputs& inputs, const std::vector<Tensor>& rows, const std::vector<Tensor>& shared,
                     const Context& context) {
  Entered entered;
  if (context.number != 0) entered.seal = seal_of(inputs, rows, shared, context);
  shard_token_rows(rows, context, entered);
  entered.shared = enter_replicated(shared, over_grid(context.groups), context.reduce_dtype);
  return entered;
}

Entered enter(const Tensor& query, const Tensor& key, const Tensor& value, const QkvWeights& weights,
              const ExtraKeys& extra, const std::vector<Tensor>& rows, const std::vector<Tensor>& shared,
              const Context& context) {
  const Inputs inputs(query, key, value);
  const auto project = context.shards_x() ? project_tokens : project_and_move;
  Entered entered = enter_beside(inputs, rows, shared, context);
  std::tie(entered.q, entered.k, entered.v) = project(inputs, weights, extra, context);
  return entered;
}

}  // namespace two_level_mha
