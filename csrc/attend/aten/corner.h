// How a kernel takes a call whose causal mask or window ends in the bottom-right corner: row l of L sees no key
// of the last L - 1 - l. Ours is offset by causal, may begin before the first key and may be strided. No torch.
#pragma once

#include <vector>

#include "../../base/arithmetic.h"
#include "../visible.h"

namespace two_level_mha {

// Keys that no row sees are cut off, which makes the corners agree. Where all rows see the same keys nothing
// causal is left, for one row of a cache say, whatever window and key_stride are.
struct Corner {
  int64_t first_key, keys;
  bool causal, fits;
  std::optional<int64_t> window;

  Corner(const Visible& v, int64_t L, int64_t S) {
    causal = !v.keys_of_all(L, S);
    first_key = v.keys_of(0, S).begin;
    keys = v.keys_of(L - 1, S).end - first_key;
    if (causal) window = v.window;
    fits = causal ? v.key_stride == 1 && *v.causal >= 0 && *v.causal <= S - L : keys > 0;
  }
};

// Rows first, first + step, .. of a call, which are a call of their own with key_stride 1.
struct Stripe {
  int64_t first, rows, step;
  Visible visible;
};

// The rows of a call that see any key, each in one stripe. Keys that stand m = key_stride apart: rows r, r + m,
// .. are a plain call, whose row t sees the keys up to t + floor((r + causal) / m). A corner in mid-matrix is
// cut there, since the rows below it see every key.
inline std::vector<Stripe> stripes_of(const Visible& v, int64_t L, int64_t S) {
  std::vector<Stripe> found;
  if (const auto all = v.keys_of_all(L, S)) {
    if (!all->empty()) found.push_back({0, L, 1, v});
    return found;
  }
  const int64_t m = v.key_stride;
  for (int64_t r = 0; r < std::min(m, L); ++r) {
    const int64_t rows = ceil_div(L - r, m), causal = floor_div(r + *v.causal, m);
    std::optional<int64_t> window;
    if (v.window) window = causal - floor_div(r + *v.causal - *v.window, m);
    if (window && *window <= 0) continue;
    if (window && *window >= causal + rows) window.reset();  // hides nothing
    const int64_t seeing = std::clamp<int64_t>(-causal, 0, rows);
    const bool cut = !window && causal > S - rows;
    const int64_t all = cut ? std::max(S - 1 - causal, seeing) : rows;
    if (all > seeing) found.push_back({r + m * seeing, all - seeing, m, {causal + seeing, window}});
    if (rows > all) found.push_back({r + m * all, rows - all, m, {}});
  }
  return found;
}

}  // namespace two_level_mha
