// One forward pass of attention on a grid, in two halves with d whole between them:
//
//   enter: project (local) -> move into the scheme's layout            norm, rotary and cache act after it
//   leave: attend (local) -> move back -> combine                      over the grid
//
// Every tensor of a rank (i, j) in between is its own: query heads and KV heads of head group i, and, where
// the scheme shards them, the rows or batches of slice j. Both halves are given one Context.
#pragma once

#include "../attend/partial_attention.h"
#include "after.h"
#include "cache.h"
#include "context.h"
#include "extra_keys.h"
#include "projection.h"

namespace two_level_mha {

// What `enter` gives. What goes with tokens is sharded as q's rows and as k's.
struct Entered {
  Tensor q, k, v;
  std::vector<Tensor> q_rows, k_rows;
  std::vector<Tensor> shared;
  std::optional<Tensor> seal;  // the call's hash, for `leave`, if the ranks compare it
};

// Inputs (B, L or S, D) replicated over the grid, (L or S, B, D) if not batch_first ->
// q, k, v of this rank. rows: tensors (B or 1, 1, L, ..) that go with the tokens, such
// as rotary angles. shared: parameters that every rank holds and uses between the
// halves for its own rows and heads; their gradients become the sum over the grid.
Entered enter(const Tensor& query, const Tensor& key, const Tensor& value, const QkvWeights& weights,
              const ExtraKeys& extra, const std::vector<Tensor>& rows, const std::vector<Tensor>& shared,
              const Context& context);

// W_O (D, H, E), or whole heads (D, H / m, d), or with
// combine="concat" all of it (D, h, d), and its bias (D,).
struct OutWeights {
  Tensor weight;
  std::optional<Tensor> bias;
};

// q, k, v as `enter` left them, or k and v those of a cache in the same layout. A cache that is given takes k
// and v first, and all of its own are attended to. attend.mask is the whole call's, broadcastable to (B, h,
// L, S) -> y (B, L, D), the same bits on every rank. scores: what is added to this rank's scores before the
// mask, broadcastable to (B, H, L, S) of its q and k.
Tensor leave(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend,
             const std::optional<Tensor>& scores, const OutWeights& out, const After& after,
             const Context& context, CacheLayer* cache = nullptr);

// What acts between the halves of `attention`: norms of q's and k's heads, (d,) each, or none; rotary angles, cos and sin
// (B or 1, 1, L, r), or none.
struct NormRotary {
  std::vector<Tensor> weights, angles;
  double eps = 0.0;
  bool interleaved = false;
};

// Both halves. In chunks of the batch one is attended to while the next comes in and the one before goes out.
Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const QkvWeights& weights,
                 const ExtraKeys& extra, const NormRotary& between, const Attend& attend,
                 const OutWeights& out, const Context& context);

// `leave`, and the attention weights after dropout: (B, h, L, S), or their mean over the heads (B, L, S). A
// row that sees no key is NaN, as in nn.MultiheadAttention with need_weights=True.
std::tuple<Tensor, Tensor> leave_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Attend& attend, const std::optional<Tensor>& scores,
                                              const OutWeights& out, const After& after,
                                              const Context& context, bool average);

}  // namespace two_level_mha
