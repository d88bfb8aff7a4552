// How a kernel takes a call whose causal mask ends in the bottom-right corner: row l of L sees all keys but
// the last L - 1 - l. Ours is offset by params.causal and may be strided.
#pragma once

#include "attention.h"

namespace two_level_mha {

// Keys that no row sees are cut off, which makes the corners agree. Where all rows see the same keys nothing
// causal is left, for one row of a cache say, whatever window and key_stride are.
struct Corner {
  int64_t first_key, keys;
  bool causal, fits;

  Corner(const AttentionParams& p, int64_t L, int64_t S) {
    const auto same = p.keys_of_all(L, S);
    causal = !same;
    first_key = same ? same->begin : 0;
    keys = p.keys_of(L - 1, S).end - first_key;
    fits = causal ? !p.window && p.key_stride == 1 && *p.causal >= 0 && *p.causal <= S - L : keys > 0;
  }
};

// A call whose corner is in mid-matrix, cut there: the rows from `before` on see every key. after == 0: it is
// not cut.
struct Cut {
  int64_t before, after;  // rows
  AttentionParams top, bottom;

  Cut(const AttentionParams& p, int64_t L, int64_t S) : before(L), top(p), bottom(p) {
    const bool plain = p.causal && !p.window && p.key_stride == 1 && *p.causal >= 0;
    if (plain && *p.causal > S - L && *p.causal < S - 1) before = S - 1 - *p.causal;
    after = L - before;
    if (after == 0) return;
    bottom.causal = std::nullopt;
    if (p.mask.defined() && p.mask.size(2) == 1) return;
    top.mask = above(p.mask);
    bottom.mask = below(p.mask);
  }
  // The rows of a tensor (.., .., L, ..), or an undefined one.
  Tensor above(const Tensor& x) const { return x.defined() ? x.narrow(2, 0, before) : x; }
  Tensor below(const Tensor& x) const { return x.defined() ? x.narrow(2, before, after) : x; }
};

}  // namespace two_level_mha
