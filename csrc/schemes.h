// The table of schemes: in which layout Q, K, V and O are when attention runs, and what moving there costs.
//
// Letters as everywhere: B batch, L query length, S key length, d head_dim; H = h / n query heads and K = k /
// n KV heads of a rank's group; m ranks in a slice group, each holding E = d / m of every head's dimension
// after projection.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "profiles.h"

namespace two_level_mha {

// How a tensor (B, heads, length, E) moves inside the slice group; the value is the dim that is dealt out
// (see pack.h).
enum class Move : int64_t { keep = -2, replicate = -1, batch = 0, rows = 2 };

enum class Scheme : int64_t { automatic, independent, slices, sequence };

struct SchemeRow {
  Scheme scheme;
  const char* name;
  Move q, k, v;  // into the layout of attention
  Move out;      // how O was dealt out, to be undone; keep: O already is a d-slice
  bool exact;
};

inline constexpr std::array<SchemeRow, 3> kSchemes{{
    // every rank runs softmax on its own d-slice: another model, attention with h * m heads of width d / m
    {Scheme::independent, "independent", Move::keep, Move::keep, Move::keep, Move::keep, false},
    // scores from whole q and k on every rank, values and output stay sliced
    {Scheme::slices, "slices", Move::replicate, Move::replicate, Move::keep, Move::keep, true},
    // L / m query rows a rank, against all keys
    {Scheme::sequence, "sequence", Move::rows, Move::replicate, Move::replicate, Move::rows, true},
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

// Sizes of one call on one rank; I is int64_t for tables and c10::SymInt inside the pass.
template <class I>
struct CallSizes {
  I B, L, S;
  int64_t H, K, d, m;
};

template <class I>
struct Cost {
  I flops;     // of attention itself, forward, one rank, no mask (2 per multiply-add)
  I elements;  // sent by one rank in the forward exchanges inside its slice group
  int64_t collectives;
};

template <class I>
I ceil_div(I a, int64_t b) {
  return (a + (b - 1)) / b;
}

// Elements that one rank sends when `size` along the dealt dim holds `rest` elements each.
template <class I>
I elements_sent(Move move, const I& dealt, const I& rest, int64_t m, bool zigzag = false) {
  switch (move) {
    case Move::keep:
      return I(0);
    case Move::replicate:
      return dealt * rest * (m - 1);
    default:
      return (zigzag ? ceil_div(dealt, 2 * m) * 2 : ceil_div(dealt, m)) * rest * (m - 1);
  }
}

template <class I>
Cost<I> scheme_cost(Scheme scheme, const CallSizes<I>& s, bool zigzag = false) {
  const SchemeRow& row = scheme_row(scheme);
  const int64_t E = s.d / s.m;
  auto sent = [&](Move move, int64_t heads, const I& length) {
    return move == Move::batch
               ? elements_sent<I>(move, s.B, length * (heads * E), s.m)
               : elements_sent<I>(move, length, s.B * (heads * E), s.m, zigzag && move == Move::rows);
  };
  const bool whole = row.q != Move::keep;  // q and k have the whole d
  const int64_t width = (whole ? s.d : E) + (row.v == Move::keep ? E : s.d);
  const I rows = row.q == Move::rows ? ceil_div(s.L, s.m) : s.L;
  const I batch = row.q == Move::batch ? ceil_div(s.B, s.m) : s.B;
  Cost<I> cost{
      batch * rows * s.S * (2 * s.H * width),
      sent(row.q, s.H, s.L) + sent(row.k, s.K, s.S) + sent(row.v, s.K, s.S) + sent(row.out, s.H, s.L),
      (row.q != Move::keep) + (row.out != Move::keep)};
  if (s.m == 1) cost.elements = I(0), cost.collectives = 0;
  return cost;
}

// Seconds times profile.flops, so that SymInts stay integers: FLOPs + bytes and latencies in FLOPs of the
// same duration.
template <class I>
I predicted_flops(const Cost<I>& cost, int64_t element_size, const Profile& profile) {
  return cost.flops + cost.elements * (element_size * (profile.flops / profile.bandwidth)) +
         I(cost.collectives * (profile.flops / 1'000'000'000 * profile.latency));
}

// The exact scheme with the smallest prediction; the earlier row wins a tie.
template <class I>
Scheme resolve_scheme(Scheme requested, const CallSizes<I>& sizes, int64_t element_size,
                      const Profile& profile) {
  if (requested != Scheme::automatic) return requested;
  if (sizes.m == 1) return Scheme::slices;
  Scheme best = Scheme::automatic;
  I best_cost(0);
  for (const SchemeRow& row : kSchemes) {
    if (!row.exact) continue;
    I cost = predicted_flops(scheme_cost(row.scheme, sizes), element_size, profile);
    if (best == Scheme::automatic || cost < best_cost) best = row.scheme, best_cost = cost;
  }
  return best;
}

}  // namespace two_level_mha
