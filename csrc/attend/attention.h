// What every attention kernel of this package is asked for and what it answers.
//
//   scores = softcap(scale * q k^T) + mask          (B, H, L, S), never held whole
//   out    = dropout(softmax(scores)) v             (B, H, L, Dv)
//   logsumexp = log(sum(exp(scores)))               (B, H, L), natural log, -inf for a row that sees no key
//
// A row that sees no key has out = 0 and passes no gradient. S == 0 is such a row.
//
// A finite mask hides nothing from a row that has nothing else: where finfo.min is added to all of a row its
// scores are equal, and its weights 1 / n, as softmax has it. Its logsumexp is finfo.min + log(n), which
// rounds to finfo.min: parts of such a row merge with equal weights. Gradients do not depend on what rounding
// lost. ATen's CUDA kernels overflow at the lowest numbers of float32 and bfloat16: there, as in stock, such
// a row has out = 0, and counts as one that sees no key.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace two_level_mha {

using at::Tensor;

// Part of a line of keys or of rows.
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  Range within(Range other) const {
    const int64_t first = std::clamp(begin, other.begin, other.end);
    return {first, std::clamp(end, first, other.end)};
  }
};

// Layout of the tensors beside it: q (B, H, L, D), k (B, K, S, D), v (B, K, S, Dv), H % K == 0 and query head
// x reads KV head x / (H / K). Strides are free, except that the last dim is contiguous; Dv may differ from
// D.
struct AttentionParams {
  double scale = 1.0;
  std::optional<int64_t> causal;  // row l sees key s only if s * key_stride <= l + *causal
  std::optional<int64_t> window;  // and only if s * key_stride > l + *causal - *window; needs causal
  double softcap = 0.0;           // c > 0: x becomes c * tanh(x / c) before the mask is added
  Tensor mask;  // undefined, or 4-D broadcastable to (B, H, L, S): bool (true = attend) or additive floating
                // point
  double dropout_p = 0.0;
  Tensor seed;  // int64, one element, on q's device; defined if dropout_p > 0
  std::array<int64_t, 3> origin{0, 0,
                                0};  // global (batch, head, row) of element [0, 0, 0]: keys the dropout mask
  int64_t key_stride = 1;            // >= 1; key s stands at position s * key_stride. 1 if dropout_p > 0

  // Keys of S that row l sees, as far as causal and window say; l + *causal may be negative.
  Range keys_of(int64_t row, int64_t S) const {
    if (!causal) return {0, S};
    const int64_t last = row + *causal;
    return Range{window ? keys_until(last - *window) : 0, keys_until(last)}.within({0, S});
  }
  // The keys of every row, where all rows see the same ones.
  std::optional<Range> keys_of_all(int64_t L, int64_t S) const {
    const Range first = keys_of(0, S), last = keys_of(L - 1, S);
    if (first.begin != last.begin || first.end != last.end) return std::nullopt;
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

using Forward = std::tuple<Tensor, Tensor>;  // out, logsumexp (float32; float64 for float64 input)
using Backward =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dmask (undefined unless asked for)

}  // namespace two_level_mha
