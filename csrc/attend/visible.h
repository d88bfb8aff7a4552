// Which keys a row sees, as far as causal and window say. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace two_level_mha {

// Part of a line of keys or of rows.
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
  Range within(Range other) const {
    const int64_t first = std::clamp(begin, other.begin, other.end);
    return {first, std::clamp(end, first, other.end)};
  }
};

struct Visible {
  std::optional<int64_t> causal;  // row l sees key s only if s * key_stride <= l + *causal
  std::optional<int64_t> window;  // and only if s * key_stride > l + *causal - *window; needs causal
  int64_t key_stride = 1;         // >= 1; key s stands at position s * key_stride

  // Keys of S that row l sees; l + *causal may be negative.
  Range keys_of(int64_t row, int64_t S) const {
    if (!causal) return {0, S};
    const int64_t last = row + *causal;
    return Range{window ? keys_until(last - *window) : 0, keys_until(last)}.within({0, S});
  }
  // The keys of every row, where all rows see the same ones.
  std::optional<Range> keys_of_all(int64_t L, int64_t S) const {
    const Range first = keys_of(0, S);
    if (!(first == keys_of(L - 1, S))) return std::nullopt;
    return first;
  }
  // Rows of L that see key s.
  Range rows_of(int64_t key, int64_t L) const {
    if (!causal) return {0, L};
    const int64_t first = key * key_stride - *causal;
    return Range{first, window ? first + *window : L}.within({0, L});
  }

 private:
  // How many keys stand at or before a position, which are none where it is negative.
  int64_t keys_until(int64_t position) const { return position < 0 ? 0 : position / key_stride + 1; }
};

}  // namespace two_level_mha
