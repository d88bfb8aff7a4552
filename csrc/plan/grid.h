// The (n, m) grid of ranks: which blocks exist, who owns
// them, which grids are valid. Pure arithmetic, no torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "../base/arithmetic.h"

namespace two_level_mha {

// More than any machine has. Products with a number of ranks and searches over it stay small.
constexpr int64_t kMaxRanks = int64_t(1) << 20;

// The columns of every head that slice j of m has: [first, first + count) of d, which DTensor's Shard deals alike. All have
// `slice_width` of them but the last ones, which are narrower, or empty; exchanges fill these up.
struct Columns {
  int64_t first, count;
};

inline int64_t slice_width(int64_t head_dim, int64_t slices) {
  return head_dim / slices + (head_dim % slices != 0);
}

inline Columns slice_columns(int64_t head_dim, int64_t slices, int64_t slice) {
  const int64_t width = slice_width(head_dim, slices), first = std::min(slice * width, head_dim);
  return {first, std::min(width, head_dim - first)};
}

// The sizes of a layer that decide which grids it can run on.
struct Heads {
  int64_t num_heads;     // h
  int64_t num_kv_heads;  // k, divides h
  int64_t head_dim;      // d

  bool positive() const { return num_heads > 0 && num_kv_heads > 0 && head_dim > 0; }
};

// P = head_groups * slices ranks; rank r = i * slices + j
// owns head group i and slice j of the head dimension.
struct Grid {
  int64_t head_groups = 1;  // n
  int64_t slices = 1;       // m

  int64_t size() const { return head_groups * slices; }
  int64_t rank(int64_t head_group, int64_t slice) const { return head_group * slices + slice; }
  int64_t head_group(int64_t rank) const { return rank / slices; }
  int64_t slice(int64_t rank) const { return rank % slices; }
  std::string text() const { return "(" + std::to_string(head_groups) + ", " + std::to_string(slices) + ")"; }

  // Every weight block has one owner, and the KV cache is never duplicated: n divides k.
  bool valid(const Heads& heads) const {
    return head_groups > 0 && slices > 0 && head_groups <= kMaxRanks / slices && heads.positive() &&
           heads.num_kv_heads % head_groups == 0 && heads.num_heads % head_groups == 0;
  }

  // Whether its slices are equal too.
  bool even(const Heads& heads) const { return valid(heads) && heads.head_dim % slices == 0; }

  // All valid grids of `ranks` ranks, most head groups first (they need the fewest exchanges).
  static std::vector<Grid> valid_grids(int64_t ranks, const Heads& heads) {
    std::vector<Grid> found;
    if (ranks > kMaxRanks) return found;
    for (int64_t n = std::min(ranks, heads.num_kv_heads); n >= 1; --n) {
      Grid grid{n, ranks / n};
      if (ranks % n == 0 && grid.valid(heads)) found.push_back(grid);
    }
    return found;
  }

  // The numbers of ranks nearest to `ranks`, below and
  // above, that have a grid of equal slices (0: none above within 4x).
  static std::pair<int64_t, int64_t> nearest(int64_t ranks, const Heads& heads) {
    int64_t below = 0, above = 0;
    const int64_t most = 4 * std::min(ranks, kMaxRanks);  // what is beyond is not near
    for (int64_t n = 1; n <= std::min(heads.num_kv_heads, most); ++n)
      for (int64_t m = 1; m <= std::min(heads.head_dim, most / n) && Grid{n, 1}.valid(heads); ++m) {
        const int64_t p = n * m;
        if (!Grid{n, m}.even(heads)) continue;
        if (p < ranks) below = std::max(below, p);
        if (p > ranks && ceil_div(p, 4) <= ranks) above = above > 0 ? std::min(above, p) : p;
      }
    return {below, above};
  }

  // Empty when valid, else the rule that broke and the grids that would do.
  std::string problem(const Heads& heads) const {
    std::ostringstream out;
    if (head_groups < 1 || slices < 1) {
      out << "head_groups and slices must be positive, got " << text();
      return out.str();
    }
    if (slices > kMaxRanks / head_groups) {
      out << "head_groups * slices must be at most " << kMaxRanks << ", got " << text();
      return out.str();
    }
    if (valid(heads)) return "";
    out << "grid " << text() << " does not fit num_heads=" << heads.num_heads
        << ", num_kv_heads=" << heads.num_kv_heads << ", head_dim=" << heads.head_dim << ": ";
    if (!heads.positive()) {
      out << "these must be positive";
      return out.str();
    }
    if (heads.num_kv_heads % head_groups != 0)
      out << "head_groups=" << head_groups << " must divide num_kv_heads=" << heads.num_kv_heads;
    else
      out << "head_groups=" << head_groups << " must divide num_heads=" << heads.num_heads;
    out << "; " << choices(size(), heads);
    return out.str();
  }

  // A sentence with the valid grids for `ranks`, or the nearest numbers of ranks that have one.
  static std::string choices(int64_t ranks, const Heads& heads) {
    auto list = [&](int64_t p) {
      std::string text;
      for (const Grid& grid : valid_grids(p, heads)) text += (text.empty() ? "" : ", ") + grid.text();
      return text;
    };
    std::ostringstream out;
    auto [below, above] = nearest(ranks, heads);
    std::string here = list(ranks);
    if (!here.empty())
      out << "valid grids for " << ranks << " ranks: " << here;
    else
      out << "no grid of " << ranks << " ranks is valid";
    if (below > 0) out << "; for " << below << ": " << list(below);
    if (above > 0) out << "; for " << above << ": " << list(above);
    return out.str();
  }
};

}  // namespace two_level_mha
