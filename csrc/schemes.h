// The table of schemes: in which layout Q, K, V and O are when attention runs, and what moving there costs.
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
#include "profiles.h"

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

// Sizes of one call on one rank; I is int64_t for tables and c10::SymInt inside the pass.
template <class I>
struct CallSizes {
  I B, L, S;
  int64_t H, K, d, m;  // H, K of the group, however they are stored
  int64_t n = 1, D = 0;
  bool concat = false;  // combine="concat"
  I position = 0;       // of the first query, for Move::cyclic
};

template <class I>
struct Cost {
  I flops;     // of attention itself, forward, one rank, no mask (2 per multiply-add)
  I elements;  // sent by one rank in the forward exchanges inside its slice group, biases apart
  int64_t collectives;
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

// Rows that one rank holds of `length`.
template <class I>
I dealt_rows(const I& length, int64_t m, bool zigzag) {
  return zigzag ? ceil_div(length, 2 * m) * 2 : ceil_div(length, m);
}

// Elements that one rank sends to move `heads` heads of `length` rows of its d-slice (or its whole heads:
// heads * E is the same).
template <class I>
I elements_sent(Move move, int64_t heads, const I& length, const CallSizes<I>& s, bool zigzag) {
  const int64_t E = s.d / s.m, others = s.m - 1;
  switch (move) {
    case Move::keep:
      return I(0);
    case Move::replicate:
      return s.B * length * (heads * E * others);
    case Move::batch:
      return ceil_div(s.B, s.m) * length * (heads * E * others);
    case Move::heads:
      return s.B * length * (heads / s.m * E * others);
    case Move::rows:
      return s.B * dealt_rows(length, s.m, zigzag) * (heads * E * others);
    case Move::cyclic:
      return s.B * ceil_div(s.position % s.m + length, s.m) * (heads * E * others);
    default:
      throw std::logic_error("a move that depends on the call");
  }
}

template <class I>
Cost<I> scheme_cost(Scheme scheme, const CallSizes<I>& s, bool zigzag = false) {
  const SchemeRow row = concrete_row(scheme, s);
  const int64_t E = s.d / s.m;
  const bool whole = scheme != Scheme::independent;  // q and k have the whole d
  const int64_t width = (whole ? s.d : E) + (row.v == Move::keep ? E : s.d);
  const I rows = row.q == Move::rows ? ceil_div(s.L, s.m) : s.L;
  const I keys = row.k == Move::cyclic ? ceil_div(s.S, s.m) : s.S;
  const I batch = row.q == Move::batch ? ceil_div(s.B, s.m) : s.B;
  const int64_t heads = scheme == Scheme::heads ? s.H / s.m : s.H;
  Cost<I> cost{batch * rows * keys * (2 * heads * width), I(0), 0};
  if (s.m == 1) return cost;
  zigzag = zigzag && row.q == Move::rows;
  if (scheme == Scheme::weights) {
    cost.elements = I((s.m - 1) * E * s.D * ((s.concat ? 1 : 2) * s.H + 2 * s.K));
    cost.collectives = 2;  // W_Q, W_K, W_V, and W_O or, for concat, O
    if (s.concat) cost.elements = cost.elements + elements_sent(row.out, s.H, s.L, s, zigzag);
    if (row.k == Move::replicate) {
      cost.elements = cost.elements + s.B * dealt_rows(s.S, s.m, zigzag) * (2 * s.K * s.d * (s.m - 1));
      cost.collectives += 1;
    }
    return cost;
  }
  cost.elements = elements_sent(row.q, s.H, s.L, s, zigzag) +
                  elements_sent(row.k, s.K, row.k == Move::cyclic ? s.L : s.S, s, zigzag) +
                  elements_sent(row.v, s.K, row.v == Move::cyclic ? s.L : s.S, s, zigzag) +
                  elements_sent(row.out == Move::merge ? Move::replicate : row.out, s.H, s.L, s, zigzag);
  cost.collectives = (row.q != Move::keep || row.k != Move::keep) + (row.out != Move::keep);
  return cost;
}

// What one rank sends to combine the outputs over the grid, forward; no elements of attention itself.
template <class I>
Cost<I> combine_cost(Scheme scheme, const CallSizes<I>& s) {
  const int64_t P = s.n * s.m;
  Cost<I> cost{I(0), I(0), 0};
  if (P == 1) return cost;
  if (s.concat) {
    const I local = s.B * s.L * (s.H * (s.d / s.m));
    cost.elements = local * (s.n - 1) + local * (s.n * (s.m - 1));
    cost.collectives = (s.n > 1) + (s.m > 1);
  } else if (scheme == Scheme::weights && s.m > 1) {
    const I mine = (s.B % s.m == 0 ? s.B * s.L : s.B * ceil_div(s.L, s.m) * s.m) * s.D / s.m;
    cost.elements = mine * (2 * (s.n - 1)) / s.n + mine * (s.m - 1);
    cost.collectives = (s.n > 1) + 1;
  } else {
    cost.elements = s.B * s.L * (2 * (P - 1) * s.D) / P;
    cost.collectives = s.n > 1 && s.m > 1 ? 3 : 1;
  }
  return cost;
}

// Seconds times profile.flops, so that SymInts stay integers: FLOPs + bytes and latencies in FLOPs of the
// same duration.
template <class I>
I predicted_flops(const Cost<I>& cost, int64_t element_size, const Profile& profile) {
  return cost.flops + cost.elements * (element_size * (profile.flops / profile.bandwidth)) +
         I(cost.collectives * (profile.flops / 1'000'000'000 * profile.latency));
}

// The scheme with the smallest prediction among those that may be chosen per call; the earlier row wins a
// tie. What is stored as whole heads runs as `heads`.
template <class I>
Scheme resolve_scheme(Scheme requested, const CallSizes<I>& sizes, int64_t element_size,
                      const Profile& profile, bool whole_heads = false) {
  if (requested != Scheme::automatic) return requested;
  if (whole_heads) return Scheme::heads;
  if (sizes.m == 1) return Scheme::slices;
  Scheme best = Scheme::automatic;
  I best_cost(0);
  for (const SchemeRow& row : kSchemes) {
    if (!row.automatic) continue;
    I cost = predicted_flops(scheme_cost(row.scheme, sizes), element_size, profile) +
             predicted_flops(combine_cost(row.scheme, sizes), element_size, profile);
    if (best == Scheme::automatic || cost < best_cost) best = row.scheme, best_cost = cost;
  }
  return best;
}

}  // namespace two_level_mha
