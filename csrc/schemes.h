// The table of schemes: in which layout Q, K, V and O are when attention runs. traffic.h says what moving
// there sends, plan.h what it costs.
//
// Letters as everywhere: B batch, L query length, S key length, D embed dim, d head_dim; H = h / n query
// heads and K = k / n KV heads of a rank's group; m ranks in a slice group, each holding E = d / m of every
// head's dimension after projection. `heads` stores the query side otherwise: H / m whole heads a rank.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "arithmetic.h"

namespace two_level_mha {

// What a rank of the slice group holds of a tensor (B, heads, length, d) when attention runs.
enum class Move : int64_t {
  keep,       // what it projected
  replicate,  // all of it
  batch,      // B / m sequences
  heads,      // heads / m whole heads
  rows,       // length / m rows, in balanced pairs of chunks if causal
  cyclic,     // the rows whose position is j modulo m
  shared,     // heads if m divides them, else all of it: of each, the heads that this rank's query heads read
  tokens,     // batch if m divides B, else rows
  merge,      // of O only: all of it, over this rank's keys; the ranks' results are merged by their logsumexp
};

enum class Scheme : int64_t { automatic, independent, slices, sequence, batch, heads, weights, position };

// How the query side (W_Q, b_Q, W_O) is stored inside a slice group: slices of every head, or whole heads.
enum class Storage : int64_t { slices, whole_heads, either };

struct SchemeRow {
  Scheme scheme;
  const char* name;
  Move q, k, v;  // into the layout of attention
  Move out;      // how O was dealt out, to be undone; keep: it already lies as it was projected
  Storage storage;
  bool exact;
  bool automatic;  // may be chosen per call by scheme="auto"
};

inline constexpr std::array<SchemeRow, 7> kSchemes{{
    // every rank runs softmax on its own d-slice: another model, attention with h * m heads of width d / m
    {Scheme::independent, "independent", Move::keep, Move::keep, Move::keep, Move::keep, Storage::slices,
     false, false},
    // scores from whole q and k on every rank, values and output stay sliced
    {Scheme::slices, "slices", Move::replicate, Move::replicate, Move::keep, Move::keep, Storage::slices,
     true, true},
    // L / m query rows a rank, against all keys
    {Scheme::sequence, "sequence", Move::rows, Move::replicate, Move::replicate, Move::rows, Storage::either,
     true, true},
    // B / m sequences a rank
    {Scheme::batch, "batch", Move::batch, Move::batch, Move::batch, Move::batch, Storage::either, true, true},
    // H / m query heads a rank, whole since their projection, against the KV heads they share
    {Scheme::heads, "heads", Move::keep, Move::shared, Move::shared, Move::keep, Storage::whole_heads, true,
     false},
    // the weights of the group are gathered, and each rank projects, attends and combines its own tokens
    {Scheme::weights, "weights", Move::tokens, Move::tokens, Move::tokens, Move::tokens, Storage::slices,
     true, true},
    // with a KV cache: every rank's own positions of the keys, for all queries
    {Scheme::position, "position", Move::replicate, Move::cyclic, Move::cyclic, Move::merge, Storage::either,
     true, false},
}};

inline const SchemeRow& scheme_row(Scheme scheme) {
  for (const SchemeRow& row : kSchemes)
    if (row.scheme == scheme) return row;
  throw std::logic_error("scheme without a row");
}

inline std::string scheme_names() {
  std::string names = "auto";
  for (const SchemeRow& row : kSchemes) names += std::string(", ") + row.name;
  return names;
}

inline Scheme scheme_from_name(const std::string& name) {
  if (name == "auto") return Scheme::automatic;
  for (const SchemeRow& row : kSchemes)
    if (name == row.name) return row.scheme;
  throw std::invalid_argument("scheme must be one of " + scheme_names() + ", got '" + name + "'");
}

// Whether a group of H query and K KV heads can be stored as whole query heads on m ranks, so that each
// rank's query heads share one KV head, or are all those of its own KV heads.
inline bool whole_heads_fit(int64_t H, int64_t K, int64_t m) {
  return H % m == 0 && (m % K == 0 || K % m == 0);
}

// One call on one rank: all that decides what it computes and sends. I is int64_t for tables and c10::SymInt
// in the pass, which fills in the first part: what the choice of a scheme looks at.
template <class I>
struct CallSizes {
  I B, L, S;           // S: every key that attention sees
  int64_t H, K, d, m;  // H, K of the group, however they are stored
  int64_t n = 1, D = 0;
  int64_t element_size = 4;
  bool causal = false;
  bool concat = false;       // combine="concat"
  bool whole_heads = false;  // how the query side is stored
  I position = 0;            // of the first query, and so the keys that a cache holds already; S counts them

  int64_t reduce_size = 0;             // bytes of an element of reduce_dtype; 0: element_size
  int64_t key_dim = 0, value_dim = 0;  // kdim, vdim; 0: D
  int64_t inputs = 1;                  // distinct tensors among query, key and value; 2: the key is the value
  int64_t extra_keys = 0;              // of the S, those that stand for no token of the input
  bool bias = false, bias_kv = false;  // biases of q, k, v; add_bias_kv
  int64_t weights = 0;                 // attention weights asked for: 1 averaged over the heads, 2 all
  int64_t mask_elements = 0;           // of an additive mask that is trained
  bool training = false;               // a backward pass will follow

  // Keys and values that this call projects: of tokens, and those that are moved.
  I given_keys() const { return S - position - extra_keys; }
  I moved_keys() const { return S - position; }
  int64_t kdim() const { return key_dim > 0 ? key_dim : D; }
  int64_t vdim() const { return value_dim > 0 ? value_dim : D; }
};

// The row with the moves of a call of these sizes in place of those that depend on them. Of `weights` they
// say what the ranks hold; nothing is moved but, where rows are dealt, the keys and values.
template <class I>
SchemeRow concrete_row(Scheme scheme, const CallSizes<I>& s) {
  SchemeRow row = scheme_row(scheme);
  if (row.k == Move::shared) row.k = row.v = s.K % s.m == 0 ? Move::heads : Move::replicate;
  if (row.q == Move::tokens) {
    if (s.B % s.m == 0)
      row.q = row.k = row.v = row.out = Move::batch;
    else
      row.q = row.out = Move::rows, row.k = row.v = Move::replicate;
  }
  return row;
}

// Whether rows are dealt out as chunks j and 2 m - 1 - j of 2 m, which balances causal attention.
inline bool deals_zigzag(const SchemeRow& concrete, bool causal) {
  return causal && concrete.q == Move::rows;
}

// Rows that one rank holds of `length`.
template <class I>
I dealt_rows(const I& length, int64_t m, bool zigzag) {
  return zigzag ? ceil_div(length, 2 * m) * 2 : ceil_div(length, m);
}

}  // namespace two_level_mha
