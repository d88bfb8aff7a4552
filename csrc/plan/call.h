// The sizes of a layer and of one call of it, which decide what every rank computes and sends. The pass, the
// table of traffic, the prices and the planner all have them from `call_sizes`. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "grid.h"
#include "turn.h"

namespace two_level_mha {

// How the tokens of X and Y lie over the ranks outside of the layer: all of them on every rank, or each with its rows of
// every sequence, or with its sequences (comm/split.h).
enum class Activations : int64_t { replicated, sequence, batch };

// Multi-head latent attention: every rank has the latents of all tokens, and what they are projected from them by. In the
// pass d is the wider of q's and v's head, filled up in every slice; D is the width of what queries are projected from.
struct LatentSizes {
  int64_t rank = 0;        // R, of the latent of keys and values; 0: there is none
  int64_t nope = 0;        // N, columns of a head of q and k that are not rotated
  int64_t rope = 0;        // T, of a head of q and of the one rotary key that are
  int64_t value = 0;       // V, of a head of v
  int64_t query_rank = 0;  // of the queries' latent; 0: they are projected from X

  int64_t head_dim(int64_t m) const { return m * slice_width(std::max(nope + rope, value), m); }
  // Columns of X's projections that every rank computes.
  int64_t whole() const { return rank + rope + query_rank; }
  // Weights that the widest rank has of a head of q, k and v, where a query is projected from D columns.
  int64_t head_weights(int64_t m, int64_t D) const {
    return slice_width(nope + rope, m) * D + (slice_width(nope, m) + slice_width(value, m)) * rank;
  }
};

// A layer as all ranks know it: what does not change from call to call.
struct LayerSizes {
  Heads heads;          // h, k, d
  int64_t D = 0;        // embed dim
  int64_t out_dim = 0;  // of Y; 0: D
  int64_t key_dim = 0;  // of the key and value inputs; 0: D
  int64_t value_dim = 0;
  bool bias = false;  // of q, k and v
  bool out_bias = false;
  bool bias_kv = false;      // a trained key and value that every query sees
  bool concat = false;       // combine="concat"
  bool whole_heads = false;  // how the query side is stored
  bool gated = false;       // every query head has a gate of its output, projected and moved as one more head
  int64_t reduce_size = 0;  // bytes of an element of reduce_dtype; 0: those of the call
  int64_t node = 1;         // ranks of a node, by the profile: profiles.h
  Activations activations = Activations::replicated;
  int64_t overlap = 1;  // chunks to cut the batch into (schemes.h); 0: as many as are predicted to be fastest
  LatentSizes latent;
};

// What a call of it is given. I is int64_t for tables and c10::SymInt in the pass.
template <class I>
struct CallShape {
  I B, L, S;                 // S: every key that attention sees, those of a cache and those of no token too
  I position = 0;            // of the first query, and so the keys that a cache holds already
  int64_t extra_keys = 0;    // of the S, those that stand for no token of the input
  int64_t element_size = 4;  // of the dtype that the projections compute in
  bool causal = false;
  bool in_halves = false;  // what comes in is all waited for before anything is attended to
  Cycle cycle = {};        // of a cache's positions
};

// One call on one rank of a grid.
template <class I>
struct CallSizes {
  I B, L, S;
  int64_t H, K, d, m;  // H, K of the group, however they are stored
  int64_t n = 1, D = 0;
  int64_t element_size = 4;
  bool causal = false;
  bool concat = false;
  bool whole_heads = false;
  bool gated = false;
  bool in_halves = false;
  I position = 0;
  Cycle cycle = {};

  int64_t reduce_size = 0;
  int64_t key_dim = 0, value_dim = 0, out_dim = 0;
  int64_t extra_keys = 0;
  LatentSizes latent;
  bool bias = false, out_bias = false, bias_kv = false;
  int64_t node = 1;
  Activations activations = Activations::replicated;
  int64_t overlap = 1;

  // What no choice of a scheme looks at.
  int64_t inputs = 1;             // distinct tensors among query, key and value; 2: the key is the value
  int64_t attention_weights = 0;  // asked for: 1 averaged over the heads, 2 all
  int64_t mask_elements = 0;      // of an additive mask that is trained
  bool training = false;          // a backward pass will follow
  bool sealed = false;            // the ranks compare the call: csrc/comm/seal.h

  // Keys and values that this call projects: of tokens, and those that are moved.
  I given_keys() const { return S - position - extra_keys; }
  I moved_keys() const { return S - position; }
  // Heads that the query side projects and moves.
  int64_t q_heads() const { return gated ? 2 * H : H; }
  bool split() const { return activations != Activations::replicated && n * m > 1; }
  // Columns of a head in the widest slice, which an exchange sends of every one.
  int64_t width() const { return slice_width(d, m); }
  // Elements of a row of `heads` heads of the query side that the widest rank has: slices of them, or whole heads.
  int64_t query_row(int64_t heads) const { return whole_heads ? heads / m * d : heads * width(); }
  int64_t kdim() const { return key_dim > 0 ? key_dim : D; }
  int64_t vdim() const { return value_dim > 0 ? value_dim : D; }
  int64_t ydim() const { return out_dim > 0 ? out_dim : D; }
};

template <class I>
CallSizes<I> call_sizes(const LayerSizes& layer, const Grid& grid, const CallShape<I>& call) {
  CallSizes<I> s{call.B,
                 call.L,
                 call.S,
                 layer.heads.num_heads / grid.head_groups,
                 layer.heads.num_kv_heads / grid.head_groups,
                 layer.heads.head_dim,
                 grid.slices};
  s.n = grid.head_groups;
  s.D = layer.D;
  s.element_size = call.element_size;
  s.causal = call.causal;
  s.in_halves = call.in_halves;
  s.concat = layer.concat;
  s.whole_heads = layer.whole_heads;
  s.gated = layer.gated;
  s.position = call.position;
  s.cycle = call.cycle;
  s.reduce_size = layer.reduce_size;
  s.key_dim = layer.key_dim;
  s.value_dim = layer.value_dim;
  s.out_dim = layer.out_dim;
  s.latent = layer.latent;
  s.extra_keys = call.extra_keys;
  s.bias = layer.bias;
  s.out_bias = layer.out_bias;
  s.bias_kv = layer.bias_kv;
  s.node = layer.node;
  s.activations = layer.activations;
  s.overlap = layer.overlap;
  return s;
}

}  // namespace two_level_mha
