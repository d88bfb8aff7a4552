#include <ATen/ATen.h>

#include "../head/norm_rotary.h"
#include "halves.h"

namespace two_level_mha {

namespace {

std::tuple<Tensor, Tensor> positioned(const Tensor& q, const Tensor& k, const Entered& beside,
                                      const NormRotary& between) {
  if (beside.shared.empty() && beside.q_rows.empty()) return {q, k};
  return norm_rotary(q, k, beside.shared, between.eps, beside.q_rows, beside.k_rows, between.interleaved);
}

// Rows of chunk c, of those that every sequence has of its own.
std::vector<Tensor> rows_of(const std::vector<Tensor>& rows, const Chunking& chunks, int64_t c) {
  std::vector<Tensor> found;
  for (const Tensor& x : rows) found.push_back(x.sym_size(0) == 1 ? x : in_chunks(x, 0, chunks)[c]);
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
    const auto [q, k] = positioned(entered.q, entered.k, entered, between);
    return leave(q, k, entered.v, attend, out, {}, context);
  }
  const Inputs inputs(query, key, value);
  const Entered whole = enter_beside(inputs, between.angles, between.weights, call);
  seal(whole);
  Leaving leaving(attend, out, std::nullopt, context);  // first: it checks the mask before anything is sent
  const GridProjection projection(inputs, weights, context, chunks);
  const Chunking here{chunks.count, 1};  // a chunk has as many sequences of each rank
  Later<std::vector<Tensor>> moving = begin_enter(projection, 0, extra, context);
  for (int64_t c = 0; c < chunks.count; ++c) {
    Later<std::vector<Tensor>> next;
    if (c + 1 < chunks.count) next = begin_enter(projection, c + 1, extra, context);
    const std::vector<Tensor> qkv = arrived(moving);
    Entered chunk;
    chunk.q_rows = rows_of(whole.q_rows, here, c), chunk.k_rows = rows_of(whole.k_rows, here, c);
    chunk.shared = whole.shared;
    const auto [q, k] = positioned(qkv[0], qkv[1], chunk, between);
    leaving(q, k, qkv[2]);
    moving = std::move(next);
  }
  return leaving.finish();
}

}  // namespace two_level_mha
