// One forward pass of attention on a grid, in two halves with d whole between them:
//
//   enter: project (local) -> move into the scheme's layout            norm, rotary and cache act after it
//   leave: attend (local) -> move back to d-slices -> combine          over the grid
//
// Every tensor of a rank (i, j) in between is its own: query heads and KV heads of head group i, and, where
// the scheme deals them out, the rows or batches of slice j.
#pragma once

#include "attend/partial_attention.h"
#include "place.h"
#include "project/whole.h"

namespace two_level_mha {

// Inputs (B, L or S, D) replicated over the grid, (L or S, B, D) if not batch_first -> q, k, v of this rank.
// position: of the first token among all, which decides the owners of new keys with scheme "position".
std::tuple<Tensor, Tensor, Tensor> enter(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const QkvWeights& weights, const ExtraKeys& extra,
                                         const Place& place, bool batch_first,
                                         const c10::SymInt& position = 0);

// How the output is put together.
struct Output {
  Tensor weight;               // (D, H, E) or whole heads (D, H / m, d); place.concat: (D, h, d), the whole
  std::optional<Tensor> bias;  // (D,)
  bool batch_first = true;
  c10::SymInt batch, length;  // B and L of the whole call
  c10::SymInt position = 0;   // as `enter` was given it
  c10::SymInt first_key = 0;  // position of the first key, and of the mask's first column
};

// q, k, v as `enter` left them, or k and v those of a cache in the same layout; attend.mask is the whole
// call's, broadcastable to (B, h, L, S) -> y (B, L, D), the same bits on every rank.
Tensor leave(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend, const Output& output,
             const Place& place);

// The same and the attention weights after dropout: (B, h, L, S), or their mean over the heads (B, L, S). A
// row that sees no key is NaN, as in nn.MultiheadAttention with need_weights=True.
std::tuple<Tensor, Tensor> leave_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Attend& attend, const Output& output, const Place& place,
                                              bool average);

// Tensors (B or 1, 1, L, ..) that go with tokens, such as rotary angles -> the rows that q and k of this rank
// are.
struct DealtRows {
  std::vector<Tensor> queries, keys;
};
DealtRows deal_rows(const std::vector<Tensor>& xs, const Tensor& q, const Tensor& k, const Output& output,
                    const Place& place);

}  // namespace two_level_mha
