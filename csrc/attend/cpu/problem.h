// One call of the blocked CPU attention: its sizes, its constants, and which keys a row can see.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

#include "../contract.h"
#include "../dropout.h"
#include "mask.h"
#include "panels.h"
#include "softmax.h"
#include "vectors.h"

namespace two_level_mha {

struct Problem {
  const AttentionParams& params;
  int64_t B, H, K, group, L, S, D, Dv;
  int64_t block_rows, block_keys;
  // Scores are kept as raw products and `unit` (times log2 e) turns them to natural ones inside the
  // exponential, unless something needs them natural before: then unit is 1.
  bool natural;
  float scale, unit, softcap;
  MaskView mask;
  int64_t seed;
  uint32_t threshold;
  float keep_scale;  // 1 / (1 - p), 1 without dropout
  bool dropout;

  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

  float unit_log2() const { return unit * 1.44269504f; }
  int64_t row_blocks() const { return ceil_div(L, block_rows); }
  int64_t key_blocks() const { return ceil_div(S, block_keys); }

  // Keys that row l sees, and rows that see key s, as far as causal and window say.
  Range keys_of(int64_t row) const { return params.keys_of(row, S); }
  Range keys_of(Range rows) const { return {keys_of(rows.begin).begin, keys_of(rows.end - 1).end}; }
  Range rows_of(int64_t key) const { return params.rows_of(key, L); }
  Range rows_of(Range keys) const { return {rows_of(keys.begin).begin, rows_of(keys.end - 1).end}; }

  // Raw products to natural scores, but for what adding a bias does.
  void make_natural(float* scores, int64_t n, float* slope) const {
    if (softcap > 0.f)
      cap_scores(scores, n, scale, softcap, slope);
    else if (natural && !mask.defined())
      scale_row(scores, n, scale, scores);
  }
  Bias bias(const float* row, int64_t first) const {
    return {row ? row + first : nullptr, softcap > 0.f ? 1.f : scale};
  }

  DropoutRow dropout_of(int64_t batch, int64_t head, int64_t row) const {
    return dropout_row(seed, params.origin[0] + batch, params.origin[1] + head, params.origin[2] + row);
  }
};

// One row of a block of raw scores, keys key .. key + n, to weights padded with zeros. `bias` is its row of
// the mask, null without one. Returns what earlier results of the row must be multiplied by.
template <class C>
float block_weights(const Problem& p, int64_t row, int64_t key, int64_t n, float* scores, const float* bias,
                    float* slope, RunningSoftmax& running, C* weights) {
  const Range seen = p.keys_of(row).within({key, key + n});
  const int64_t begin = seen.begin - key, end = seen.end - key, count = end - begin;
  std::memset(static_cast<void*>(weights), 0, begin * sizeof(C));
  std::memset(static_cast<void*>(weights + end), 0, (padded(n) - end) * sizeof(C));
  if (seen.empty()) return 1.f;
  p.make_natural(scores + begin, count, slope);
  return softmax_step(scores + begin, p.bias(bias, begin), count, p.unit_log2(), running, weights + begin);
}

}  // namespace two_level_mha
