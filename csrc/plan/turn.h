// Which positions of a KV cache a rank keeps: they are dealt in cycles, of which every rank has a run. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../base/arithmetic.h"

namespace two_level_mha {

// Of a cycle: proportions of memory need no finer ones.
inline constexpr int64_t kMostShares = 1024;

// Positions first, ..., first + run - 1 of every `cycle`.
struct Turn {
  int64_t cycle = 1, first = 0, run = 1;

  // How many of the positions 0, ..., end - 1 are this rank's. Without a comparison, so that `end` may be symbolic.
  template <class I>
  I before(const I& end) const {
    if (run == 1) return (end + (cycle - 1 - first)) / cycle;
    const I place = end % cycle;
    const I begun = (place + (cycle - first)) / cycle,
            ended = (place + (cycle - first - run)) / cycle;  // 0 or 1
    return end / cycle * run + begun * (place - first) - ended * (place - first - run);
  }
  template <class I>
  I between(const I& begin, const I& end) const {
    return before(end) - before(begin);
  }
  // Position of this rank's number-th token; run > 0.
  template <class I>
  I position(const I& number) const {
    return number / run * cycle + first + number % run;
  }
  // Room that does for any `count` positions in a row.
  template <class I>
  I room(const I& count) const {
    return ceil_div(count, cycle) * run;
  }
};

// shares: every rank's run, the first rank's first; none: each has one.
inline Turn turn_of(const std::vector<int64_t>& shares, int64_t ranks, int64_t rank) {
  if (shares.empty()) return {ranks, rank, 1};
  const auto at = shares.begin() + rank;
  return {std::accumulate(shares.begin(), shares.end(), int64_t(0)),
          std::accumulate(shares.begin(), at, int64_t(0)), *at};
}

// Whether they are a cycle of so many ranks.
inline bool valid_shares(const std::vector<int64_t>& shares, int64_t ranks) {
  int64_t cycle = 0;
  for (int64_t share : shares) {
    if (share < 0 || share > kMostShares - cycle) return false;
    cycle += share;
  }
  return shares.empty() || (int64_t(shares.size()) == ranks && cycle > 0);
}

// A cycle as sizes of a call have it: of all ranks alike.
struct Cycle {
  int64_t length = 0;  // 0: of one position for each rank
  int64_t most = 1;    // that a rank has of it

  // Rows that are sent to every rank of m to move the positions from `position` on: as many to all.
  template <class I>
  I rows(const I& position, const I& count, int64_t m) const {
    if (length == 0) return ceil_div(position % m + count, m);
    if (const auto few = known(count); few && *few <= most) return count;
    return ceil_div(position % length + count, length) * most;
  }
  // The most that a rank of m has of `count` positions.
  template <class I>
  I share(const I& count, int64_t m) const {
    return length == 0 ? ceil_div(count, m) : ceil_div(count, length) * most;
  }
};

inline Cycle cycle_of(const std::vector<int64_t>& shares) {
  if (shares.empty()) return {};
  return {std::accumulate(shares.begin(), shares.end(), int64_t(0)),
          *std::max_element(shares.begin(), shares.end())};
}

}  // namespace two_level_mha
