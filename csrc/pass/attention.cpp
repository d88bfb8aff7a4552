#include <ATen/core/Tensor.h>

#include "../head/norm_rotary.h"
#include "halves.h"

namespace two_level_mha {

namespace {

using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensor> positioned(const Tensor& q, const Tensor& k, const Tensors& weights,
                                      const Tensors& q_rows, const Tensors& k_rows,
                                      const NormRotary& between) {
  if (weights.empty() && q_rows.empty()) return {q, k};
  return norm_rotary(q, k, weights, between.eps, q_rows, k_rows, between.interleaved);
}

// The rows of every chunk, of which those of one sequence are for all.
std::vector<Tensors> rows_in_chunks(const Tensors& rows, const Chunking& chunks) {
  std::vector<Tensors> found(chunks.count);
  for (const Tensor& x : rows) {
    const auto parts = x.sym_size(0) == 1 ? Tensors(chunks.count, x) : in_chunks(x, 0, chunks);
    for (int64_t c = 0; c < chunks.count; ++c) found[c].push_back(parts[c]);
  }
  return found;
}

}  // namespace

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const QkvWeights& weights,
                 const ExtraKeys& extra, const NormRotary& between, const Attend& attend,
                 const OutWeights& out, const Context& call) {
  Context context = call;
  auto seal = [&](const Entered& entered) {
    if (entered.seal) context.seal = Seal{*entered.seal, context.groups.grid};
  };
  const Chunking chunks = call.leave_chunks();
  if (chunks.count == 1) {
    const Entered entered = enter(query, key, value, weights, extra, between.angles, between.weights, call);
    seal(entered);
    const auto [q, k] =
        positioned(entered.q, entered.k, entered.shared, entered.q_rows, entered.k_rows, between);
    return leave(q, k, entered.v, attend, std::nullopt, out, {}, context);
  }
  const Inputs inputs(query, key, value);
  const Entered whole = enter_beside(inputs, between.angles, between.weights, call);
  seal(whole);
  Leaving leaving(attend, out, std::nullopt, context);  // first: it checks the mask before anything is sent
  const GridProjection projection(inputs, weights, context, chunks);
  const Chunking here{chunks.count, 1};  // a chunk has as many sequences of each rank
  const auto q_rows = rows_in_chunks(whole.q_rows, here), k_rows = rows_in_chunks(whole.k_rows, here);
  Later<Tensors> moving = begin_enter(projection, 0, extra, context);
  for (int64_t c = 0; c < chunks.count; ++c) {
    Later<Tensors> next;
    if (c + 1 < chunks.count) next = begin_enter(projection, c + 1, extra, context);
    const Tensors qkv = arrived(moving);
    const auto [q, k] = positioned(qkv[0], qkv[1], whole.shared, q_rows[c], k_rows[c], between);
    leaving(q, k, qkv[2]);
    moving = std::move(next);
  }
  return leaving.finish();
}

}  // namespace two_level_mha
