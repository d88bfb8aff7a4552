// How a kernel takes a call whose causal mask ends in the bottom-right corner: row l of L sees all keys but
// the last L - 1 - l. Ours is offset by causal and may be strided. No torch.
#pragma once

#include "../visible.h"

namespace two_level_mha {

// Keys that no row sees are cut off, which makes the corners agree. Where all rows see the same keys nothing
// causal is left, for one row of a cache say, whatever window and key_stride are.
struct Corner {
  int64_t first_key, keys;
  bool causal, fits;

  Corner(const Visible& v, int64_t L, int64_t S) {
    const auto same = v.keys_of_all(L, S);
    causal = !same;
    first_key = same ? same->begin : 0;
    keys = v.keys_of(L - 1, S).end - first_key;
    fits = causal ? !v.window && v.key_stride == 1 && *v.causal >= 0 && *v.causal <= S - L : keys > 0;
  }
};

// A call whose corner is in mid-matrix, cut there: the rows from `before` on see every key, so that they are
// a call without a causal mask. after == 0: it is not cut.
struct Cut {
  int64_t before, after;  // rows

  Cut(const Visible& v, int64_t L, int64_t S) : before(L) {
    const bool plain = v.causal && !v.window && v.key_stride == 1 && *v.causal >= 0;
    if (plain && *v.causal > S - L && *v.causal < S - 1) before = S - 1 - *v.causal;
    after = L - before;
  }
};

}  // namespace two_level_mha
