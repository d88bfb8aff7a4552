// Which rows, sequences and heads this rank holds in a call, and the exchanges into and out of that layout.
#pragma once

#include "../place.h"

#include <utility>
#include <vector>

namespace two_level_mha {

// Sizes of one call as every rank knows them.
struct CallShape {
  c10::SymInt batch, length, keys;  // B, L, S
  c10::SymInt position = 0;         // of the first query among all tokens; keys of a cache lie before it
};

struct Layout {
  SchemeRow row;  // its moves are those of this call
  Scheme scheme;
  int64_t m, j;
  bool zigzag;       // rows are dealt as pairs of chunks, j and 2 m - 1 - j of 2 m
  int64_t head_dim;  // the dim of q and o that the slice group splits: 1 (whole heads) or 3 (d-slices)
  CallShape shape;

  // H, K heads of the group, d whole; dtype of q.
  Layout(const Place& place, const CallShape& shape, int64_t H, int64_t K, int64_t d, int64_t D,
         at::ScalarType dtype, bool cuda);

  bool by_tokens() const { return scheme == Scheme::weights && m > 1; }
  // Dim of (B, heads, length, d) along which the queries are dealt out: 0, 2, or -1 if they are not.
  int64_t dealt_dim() const;
  // What this rank holds along dealt_dim: (first, count), the last may reach beyond the whole.
  std::vector<std::pair<c10::SymInt, c10::SymInt>> runs() const;
  // Position of this rank's first key at or after `first`, less `first`; its keys are m apart.
  c10::SymInt first_cyclic(const c10::SymInt& first) const;
};

// This rank's part of x, which has the whole of dealt_dim, with `fill` beyond its end; x if nothing is dealt.
Tensor deal(const Tensor& x, const Layout& layout, double fill = 0.0);
// Rows of x (.., length, ..) along dim 2 whose position is this rank's.
Tensor deal_cyclic(const Tensor& x, const Layout& layout);

// q, k, v as projected -> as the scheme's row says, in one exchange inside the slice group.
std::vector<Tensor> move_in(const std::vector<Tensor>& qkv, const Layout& layout, const Group& group);

// O in the layout of q -> as it would have been projected: d-slices or whole heads, of all rows.
Tensor move_out(const Tensor& o, const Layout& layout, const Group& group);

// O and logsumexp over this rank's keys, of all rows -> O over all keys, as it would have been projected.
Tensor merge_out(const Tensor& o, const Tensor& logsumexp, const Layout& layout, const Group& group);

}  // namespace two_level_mha
