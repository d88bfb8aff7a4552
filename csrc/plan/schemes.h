// The table of schemes: where tokens, weights, Q, K, V and O are when attention runs. traffic.h says what
// moving there sends, price.h what it costs.
//
// Letters as everywhere: B batch, L query length, S key length, D embed dim, d head_dim; H = h / n query
// heads and K = k / n KV heads of a rank's group; m ranks in a slice group, each holding E columns of every
// head after projection, ceil(d / m) or what is left of them (grid.h). `heads` stores the query side otherwise: H / m whole heads a rank.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "call.h"

namespace two_level_mha {

// What a rank of the slice group holds of a tensor: of X and Y (B, length, D), of W its blocks, of the others
// (B, heads, length, d) when attention runs.
enum class Move : int64_t {
  keep,       // what it projected; of W what it stores
  replicate,  // all of it
  batch,      // B / m sequences
  heads,      // heads / m whole heads
  one_head,   // all of it is sent, and the one head is kept that this rank's query heads read
  rows,       // length / m rows, in balanced pairs of chunks if causal
  cyclic,     // the rows whose positions are its own: turn.h
  shared,     // heads if m divides them, else one_head
  tokens,     // batch if m divides B, else rows
  merge,      // of O only: all of it, over this rank's keys; the ranks' results are merged by their logsumexp
};

enum class Scheme : int64_t { automatic, independent, slices, sequence, batch, heads, weights, position };

// How the query side (W_Q, b_Q, W_O) is stored inside a slice group: slices of every head, or whole heads.
enum class Storage : int64_t { slices, whole_heads, either };

// Whether a scheme runs a call with keys in a cache; it is then the cache's layout.
enum class Cached : int64_t { never, may, always };

struct SchemeRow {
  Scheme scheme;
  const char* name;
  Move x, y;     // how the tokens of X arrive at the projections, and those of Y leave attention's combine
  Move w;        // the weights that project them
  Move q, k, v;  // into the layout of attention
  Move out;      // how O was sharded, to be undone; keep: it lies as it is combined
  Storage storage;
  Cached cached;
  bool exact;
  bool automatic;  // may be chosen per call by scheme="auto"
};

// clang-format off
inline constexpr std::array<SchemeRow, 7> kSchemes{{
    // every rank runs softmax on its own d-slice: another model, attention with h * m heads of width d / m
    {.scheme = Scheme::independent, .name = "independent",
     .x = Move::replicate, .y = Move::replicate, .w = Move::keep,
     .q = Move::keep, .k = Move::keep, .v = Move::keep, .out = Move::keep,
     .storage = Storage::slices, .cached = Cached::never, .exact = false, .automatic = false},
    // scores from whole q and k on every rank, values and output stay sliced
    {.scheme = Scheme::slices, .name = "slices",
     .x = Move::replicate, .y = Move::replicate, .w = Move::keep,
     .q = Move::replicate, .k = Move::replicate, .v = Move::keep, .out = Move::keep,
     .storage = Storage::slices, .cached = Cached::never, .exact = true, .automatic = true},
    // L / m query rows a rank, against all keys
    {.scheme = Scheme::sequence, .name = "sequence",
     .x = Move::replicate, .y = Move::replicate, .w = Move::keep,
     .q = Move::rows, .k = Move::replicate, .v = Move::replicate, .out = Move::rows,
     .storage = Storage::either, .cached = Cached::never, .exact = true, .automatic = true},
    // B / m sequences a rank
    {.scheme = Scheme::batch, .name = "batch",
     .x = Move::replicate, .y = Move::replicate, .w = Move::keep,
     .q = Move::batch, .k = Move::batch, .v = Move::batch, .out = Move::batch,
     .storage = Storage::either, .cached = Cached::may, .exact = true, .automatic = true},
    // H / m query heads a rank, whole since their projection, against the KV heads they share
    {.scheme = Scheme::heads, .name = "heads",
     .x = Move::replicate, .y = Move::replicate, .w = Move::keep,
     .q = Move::keep, .k = Move::shared, .v = Move::shared, .out = Move::keep,
     .storage = Storage::whole_heads, .cached = Cached::never, .exact = true, .automatic = false},
    // the weights of the group are gathered, and each rank projects, attends and combines its own tokens
    {.scheme = Scheme::weights, .name = "weights",
     .x = Move::tokens, .y = Move::tokens, .w = Move::replicate,
     .q = Move::tokens, .k = Move::tokens, .v = Move::tokens, .out = Move::tokens,
     .storage = Storage::slices, .cached = Cached::never, .exact = true, .automatic = true},
    // with a KV cache: every rank's own positions of the keys, for all queries
    {.scheme = Scheme::position, .name = "position",
     .x = Move::replicate, .y = Move::replicate, .w = Move::keep,
     .q = Move::replicate, .k = Move::cyclic, .v = Move::cyclic, .out = Move::merge,
     .storage = Storage::either, .cached = Cached::always, .exact = true, .automatic = false},
}};
// clang-format on

inline const SchemeRow& scheme_row(Scheme scheme) {
  for (const SchemeRow& row : kSchemes)
    if (row.scheme == scheme) return row;
  throw std::logic_error("scheme without a row");
}

// Whether a scheme runs with m slices of d columns: where they are heads of their own, they are equal.
inline bool slices_fit(const SchemeRow& row, int64_t d, int64_t m) {
  return row.exact || d % m == 0;
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

// Whether the parts that ranks have of split activations make up, over the head axis, what a rank of the slice group takes
// as its own tokens: whole chunks of rows, or of sequences.
template <class I>
bool whole_chunks(const CallSizes<I>& s) {
  const int64_t P = s.n * s.m;
  if (!s.split() || s.m == 1) return false;
  if (s.activations == Activations::batch) return s.B % P == 0;
  return s.L % (2 * P) == 0 && s.given_keys() % (2 * P) == 0;
}

// The row with the moves of a call of these sizes in place of those that depend on them.
template <class I>
SchemeRow concrete_row(Scheme scheme, const CallSizes<I>& s) {
  SchemeRow row = scheme_row(scheme);
  if (row.k == Move::shared) row.k = row.v = s.K % s.m == 0 ? Move::heads : Move::one_head;
  if (row.q == Move::tokens) {
    const bool by_rows = s.activations == Activations::sequence && whole_chunks(s);
    const bool by_batch = !by_rows && s.B % s.m == 0;
    row.q = row.out = by_batch ? Move::batch : Move::rows;
    row.k = row.v = by_batch ? Move::batch : Move::replicate;
  }
  // Alone in its slice group a rank has all tokens. The concatenation takes O of all of them as it is
  // projected; else each rank combines its own.
  if (row.x == Move::tokens) row.x = s.m == 1 ? Move::replicate : row.q;
  if (row.y == Move::tokens) row.y = s.m == 1 || s.concat ? Move::replicate : row.q;
  if (row.y != Move::replicate) row.out = Move::keep;
  if (s.m == 1) row.w = Move::keep;
  return row;
}

// Whether scheme "weights" takes split activations as they are, X but for the head axis. Y too, if not concatenated.
template <class I>
bool takes_parts(const SchemeRow& concrete, const CallSizes<I>& s) {
  return concrete.x != Move::replicate && whole_chunks(s);
}

// Of a call that asks for them: beyond it exchanges are all latency.
inline constexpr int64_t kMostChunks = 1024;

// Chunks of the batch, each computed while the one before is exchanged. A chunk has every `parts`-th of the sequences'
// equal parts: of those that the ranks of a slice group attend to each, it has as many.
struct Chunking {
  int64_t count = 1, parts = 1;
};

// Those of `enter`, and of `leave`, where what is gathered in two stages, or averaged over ranks, stays whole. One where
// the batch is no dim of what is exchanged: scheme "weights", keys in a cache by position, activations split by sequences.
// A symbolic batch costs a guard, and so another graph only for one that is smaller, or divides otherwise.
template <class I>
Chunking enter_chunks(const SchemeRow& concrete, const CallSizes<I>& s) {
  const bool whole = s.n * s.m == 1 || concrete.x != Move::replicate || concrete.out == Move::merge ||
                     (s.split() && s.activations == Activations::batch);
  const int64_t asked = s.overlap, parts = concrete.q == Move::batch ? s.m : 1;
  if (whole || asked <= 1) return {};
  if (parts == 1) {
    if (!(s.B < I(asked))) return {asked, 1};
    return {std::max<int64_t>(1, known(s.B).value_or(1)), 1};
  }
  for (int64_t count = asked; count > 1; --count)
    if (s.B % I(parts * count) == I(0)) return {known(s.B) == 0 ? 1 : count, parts};
  return {1, parts};
}

template <class I>
Chunking leave_chunks(const SchemeRow& concrete, const CallSizes<I>& s) {
  return s.concat || s.attention_weights ? Chunking{} : enter_chunks(concrete, s);
}

// The sequences before chunk c of `batch` in one part.
template <class I>
I chunk_begin(const Chunking& chunks, const I& batch, int64_t c) {
  return batch * c / (chunks.parts * chunks.count);
}

// Whether rows are sharded as chunks j and 2 m - 1 - j of 2 m, which balances causal attention.
inline bool zigzag_rows(const SchemeRow& concrete, bool causal) {
  return causal && concrete.q == Move::rows;
}

// Rows that one rank holds of `length`.
template <class I>
I shard_rows(const I& length, int64_t m, bool zigzag) {
  return zigzag && m > 1 ? ceil_div(length, 2 * m) * 2 : ceil_div(length, m);
}

}  // namespace two_level_mha
