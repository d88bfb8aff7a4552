// One call on one rank: all that decides what it computes and sends. Made once, by `context_of`, from
// integers that every rank knows; each half of the pass is given the same ones. Tensors are held against it,
// never asked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../comm/group.h"
#include "../plan/price.h"
#include "numbers.h"

namespace two_level_mha {

// The constants of a layer on its rank. Operators take them as one list, in the order of kLayerFields.
struct LayerNumbers {
  int64_t head_groups, slices, head_group, slice;  // n, m, i, j
  int64_t num_heads, num_kv_heads, head_dim;       // h, k, d
  int64_t embed_dim, key_dim, value_dim;           // D, and of the key and value inputs
  int64_t bias, bias_kv;  // whether q, k, v have biases; whether there is bias_k, bias_v
  int64_t whole_heads;    // how the query side is stored: (H / m, d, D), not (H, E, D)
  int64_t concat;         // combine="concat"
  int64_t reduce_dtype;   // an at::ScalarType, or -1: that of what is summed
  int64_t flops, memory, link, network, latency, node, equal;  // the profile (plan/profiles.h)
};

inline constexpr Field<LayerNumbers, int64_t> kLayerFields[] = {
    {"head_groups", &LayerNumbers::head_groups},
    {"slices", &LayerNumbers::slices},
    {"head_group", &LayerNumbers::head_group},
    {"slice", &LayerNumbers::slice},
    {"num_heads", &LayerNumbers::num_heads},
    {"num_kv_heads", &LayerNumbers::num_kv_heads},
    {"head_dim", &LayerNumbers::head_dim},
    {"embed_dim", &LayerNumbers::embed_dim},
    {"key_dim", &LayerNumbers::key_dim},
    {"value_dim", &LayerNumbers::value_dim},
    {"bias", &LayerNumbers::bias},
    {"bias_kv", &LayerNumbers::bias_kv},
    {"whole_heads", &LayerNumbers::whole_heads},
    {"concat", &LayerNumbers::concat},
    {"reduce_dtype", &LayerNumbers::reduce_dtype},
    {"flops", &LayerNumbers::flops},
    {"memory", &LayerNumbers::memory},
    {"link", &LayerNumbers::link},
    {"network", &LayerNumbers::network},
    {"latency", &LayerNumbers::latency},
    {"node", &LayerNumbers::node},
    {"equal", &LayerNumbers::equal},
};

// What differs from call to call. Operators take it as one list, in the order of kCallFields.
struct CallNumbers {
  c10::SymInt scheme;        // a Scheme; with keys in a cache its layout
  c10::SymInt batch;         // B
  c10::SymInt length;        // L
  c10::SymInt keys;          // tokens of the key input
  c10::SymInt zero_key;      // whether a key and value of zeros is added, which every query sees
  c10::SymInt position;      // of the first query among all tokens; keys of a cache lie before it
  c10::SymInt first_key;     // position of the first key that is seen, and of the mask's first column
  c10::SymInt causal;        // whether rows see only what is before them
  c10::SymInt batch_first;   // X and Y are (B, L, D), else (L, B, D)
  c10::SymInt element_size;  // bytes, of the dtype that the projections compute in
};

inline constexpr Field<CallNumbers, c10::SymInt> kCallFields[] = {
    {"scheme", &CallNumbers::scheme},           {"batch", &CallNumbers::batch},
    {"length", &CallNumbers::length},           {"keys", &CallNumbers::keys},
    {"zero_key", &CallNumbers::zero_key},       {"position", &CallNumbers::position},
    {"first_key", &CallNumbers::first_key},     {"causal", &CallNumbers::causal},
    {"batch_first", &CallNumbers::batch_first}, {"element_size", &CallNumbers::element_size},
};

struct Context {
  Grid grid;
  int64_t head_group = 0, slice = 0;  // (i, j)
  Groups groups;
  CallSizes<c10::SymInt> sizes;
  SchemeRow row;  // of the scheme that the call runs with, its moves those of these sizes
  c10::SymInt first_key;
  bool zero_key = false;
  bool batch_first = true;
  std::optional<at::ScalarType> reduce_dtype;

  // Rows are sharded as chunks j and 2 m - 1 - j of 2 m.
  bool zigzag() const { return zigzag_rows(row, sizes.causal); }
  // The dim of q and o (B, heads, length, d) that the slice group splits: whole heads, or d-slices.
  int64_t split_dim() const { return sizes.whole_heads ? 1 : 3; }
  // Dim of (B, heads, length, d) along which the queries are sharded: 0, 2, or -1 if they are not.
  int64_t sharded_dim() const;
  // Tokens of X, and of Y, are sharded over the slice group.
  bool shards_x() const { return row.x != Move::replicate; }
  bool shards_y() const { return row.y != Move::replicate; }
  // What this rank holds along a sharded dim of `size`: (first, count), the last may reach beyond the whole.
  std::vector<std::pair<c10::SymInt, c10::SymInt>> runs(const c10::SymInt& size) const;
  // Position of this rank's first key at or after `first`, less `first`; its keys are m apart.
  c10::SymInt first_cyclic(const c10::SymInt& first) const;
};

// Raises ValueError for numbers that are no call: too few of them, a rank outside its grid, a
// scheme that the storage of the query side does not run.
Context context_of(at::IntArrayRef layer, const std::vector<std::string>& groups, c10::SymIntArrayRef call);

// Raises ValueError unless q, k and v have the heads, widths and lengths of the call.
void check_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Context& context);

}  // namespace two_level_mha
