// One call on one rank: all that decides what it computes and sends. Made
// once, by `context_of`, from integers that every rank knows; each half of
// the pass is given the same ones. Tensors are held against it, never asked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../comm/group.h"
#include "../comm/seal.h"
#include "../comm/split.h"
#include "../plan/price.h"
#include "numbers.h"

namespace two_level_mha {

// The constants of a call: those of the layer on its rank, then how this call runs it. Operators take them as
// one list, in the order of kConstants.
struct Constants {
  int64_t head_groups = 1, slices = 1, head_group = 0, slice = 0;  // n, m, i, j
  int64_t num_heads = 1, num_kv_heads = 1, head_dim = 1;           // h, k, d
  int64_t embed_dim = 1;                                           // D
  int64_t key_dim = 0, value_dim = 0;                              // of the key and value inputs; 0: D
  int64_t out_dim = 0;                                             // of the output; 0: D
  int64_t bias = 0;                                                // whether q, k, v have biases
  int64_t out_bias = 0;                                            // whether the output has one
  int64_t bias_kv = 0;                                             // whether there is a bias_k and a bias_v
  int64_t whole_heads = 0;    // how the query side is stored: (H / m, d, D), not (H, E, D)
  int64_t concat = 0;         // combine="concat"
  int64_t gated = 0;          // whether every query head has a gate of its output: q_weight has 2 h heads
  int64_t reduce_dtype = -1;  // an at::ScalarType, or -1: that of what is summed
  int64_t activations = 0;    // an Activations
  int64_t overlap = 1;        // chunks of the batch; 0: as the rates predict
  // The rates by which scheme="auto" chooses: plan/profiles.h.
  int64_t flops = 1, memory = 1, link = 1, network = 1, latency = 0, node = 1, equal = 0, flops_single = 1;
  int64_t attention_128 = 1, attention_256 = 1, attention_wide = 1;
  int64_t attention_single_128 = 1, attention_single_256 = 1, attention_single_wide = 1;
  int64_t hidden = 0;

  int64_t scheme = int64_t(Scheme::automatic);  // a Scheme; with keys in a cache its layout
  int64_t causal = 0;                           // whether rows see only what is before them
  int64_t element_size = 4;                     // bytes, of the dtype that the projections compute in
  int64_t zero_key = 0;     // whether a key and value of zeros is added, which every query sees
  int64_t batch_first = 1;  // X and Y are (B, L, D), else (L, B, D)
  int64_t in_halves = 0;    // whether the call is `enter` and `leave`, and not `attention`
};

inline constexpr Field<Constants, int64_t> kConstants[] = {
    {"head_groups", &Constants::head_groups},
    {"slices", &Constants::slices},
    {"head_group", &Constants::head_group},
    {"slice", &Constants::slice},
    {"num_heads", &Constants::num_heads},
    {"num_kv_heads", &Constants::num_kv_heads},
    {"head_dim", &Constants::head_dim},
    {"embed_dim", &Constants::embed_dim},
    {"key_dim", &Constants::key_dim},
    {"value_dim", &Constants::value_dim},
    {"out_dim", &Constants::out_dim},
    {"bias", &Constants::bias},
    {"out_bias", &Constants::out_bias},
    {"bias_kv", &Constants::bias_kv},
    {"whole_heads", &Constants::whole_heads},
    {"concat", &Constants::concat},
    {"gated", &Constants::gated},
    {"reduce_dtype", &Constants::reduce_dtype},
    {"activations", &Constants::activations},
    {"overlap", &Constants::overlap},
    {"flops", &Constants::flops},
    {"memory", &Constants::memory},
    {"link", &Constants::link},
    {"network", &Constants::network},
    {"latency", &Constants::latency},
    {"node", &Constants::node},
    {"equal", &Constants::equal},
    {"flops_single", &Constants::flops_single},
    {"attention_128", &Constants::attention_128},
    {"attention_256", &Constants::attention_256},
    {"attention_wide", &Constants::attention_wide},
    {"attention_single_128", &Constants::attention_single_128},
    {"attention_single_256", &Constants::attention_single_256},
    {"attention_single_wide", &Constants::attention_single_wide},
    {"hidden", &Constants::hidden},
    {"scheme", &Constants::scheme},
    {"causal", &Constants::causal},
    {"element_size", &Constants::element_size},
    {"zero_key", &Constants::zero_key},
    {"batch_first", &Constants::batch_first},
    {"in_halves", &Constants::in_halves},
};

// The sizes of a call, which may be symbolic. Operators take them as one list, in the order of kSizes.
struct Sizes {
  c10::SymInt batch = 1, length = 1;  // B, L
  c10::SymInt keys = 1;               // tokens of the key input
  c10::SymInt position = 0;           // of the first query among all tokens; keys of a cache lie before it
  c10::SymInt first_key = 0;  // position of the first key that is seen, and of the mask's first column
  // For `enter`, behind the list: a number that the ranks compare, with all that is alike in the call (comm/seal.h); 0
  // if they do not.
  int64_t number = 0;
};

inline constexpr Field<Sizes, c10::SymInt> kSizes[] = {
    {"batch", &Sizes::batch},       {"length", &Sizes::length},       {"keys", &Sizes::keys},
    {"position", &Sizes::position}, {"first_key", &Sizes::first_key},
};

struct Context {
  Grid grid;
  int64_t head_group = 0, slice = 0;  // (i, j)
  Turn turn;                          // this rank's of the slice group, of keys in a cache by position
  std::vector<int64_t> shares;        // of all ranks of the group; empty: equal
  Groups groups;
  CallSizes<c10::SymInt> sizes;
  SchemeRow row;  // of the scheme that the call runs with, its moves those of these sizes
  c10::SymInt first_key;
  c10::SymInt first_sequence =
      0;  // of a chunk of the batch: what its first is in the call, less what runs() says
  bool zero_key = false;
  bool batch_first = true;
  bool takes_parts = false;  // this rank's tokens are parts of the head axis
  std::optional<at::ScalarType> reduce_dtype;
  int64_t number = 0;        // as Sizes has it; 0 on one rank
  std::optional<Seal> seal;  // of what the ranks compare, as far as it is known

  // Rows are sharded as chunks j and 2 m - 1 - j of 2 m.
  bool zigzag() const { return zigzag_rows(row, sizes.causal || takes_parts); }
  // Of the batch, before attention and after it.
  Chunking enter_chunks() const { return two_level_mha::enter_chunks(row, sizes); }
  Chunking leave_chunks() const { return two_level_mha::leave_chunks(row, sizes); }
  // The call of chunk c of the batch alone.
  Context of_chunk(const Chunking& chunks, int64_t c) const;
  // The dim of q and o (B, heads, length, d) that the slice group splits: whole heads, or d-slices.
  int64_t split_dim() const { return sizes.whole_heads ? 1 : 3; }
  // What of every head this rank's slice has.
  Columns columns() const { return slice_columns(sizes.d, sizes.m, slice); }
  // Dim of (B, heads, length, d) along which the queries are sharded: 0, 2, or -1 if they are not.
  int64_t sharded_dim() const;
  // Tokens of X, and of Y, are sharded over the slice group.
  bool shards_x() const { return row.x != Move::replicate; }
  bool shards_y() const { return row.y != Move::replicate; }
  // X and Y are split over the grid, outside of the layer.
  bool splits() const { return sizes.split(); }
  Split split() const {
    return {groups.grid, grid.head_groups, grid.slices, head_group, slice, sizes.activations};
  }
  Split head_split() const { return {groups.head, grid.head_groups, 1, head_group, 0, sizes.activations}; }
  // What this rank holds along a sharded dim of `size`: (first, count), the last may reach beyond the whole.
  std::vector<std::pair<c10::SymInt, c10::SymInt>> runs(const c10::SymInt& size) const;
};

// names: those of the groups of the slice axis, of the head axis and of the grid, then of the layer, and the shares of
// the slice group's ranks in a cache by position, with blanks between; either may be empty or left out. A group of one
// needs no name.
// Raises ValueError for numbers that are no call: too few of them, a rank outside its grid, a
// scheme that the storage of the query side does not run.
Context context_of(const Constants& constants, const std::vector<std::string>& names, const Sizes& sizes);

// The same for operators, which take the constants as one text, the cheapest
// argument there is: the numbers in the order of kConstants, and on lines of
// their own the names. Sizes in the order of kSizes.
Context context_of(const std::string& constants, c10::SymIntArrayRef sizes);

// Raises ValueError unless the grid has a rank (i, j).
void check_place(const Grid& grid, int64_t head_group, int64_t slice);

// Raises ValueError unless q, k and v have the heads, widths and lengths of the call.
void check_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Context& context);

}  // namespace two_level_mha
