// What every attention kernel of this package is asked for and what it answers.
//
//   scores = softcap(scale * q k^T) + mask          (B, H, L, S), never held whole
//   out    = dropout(softmax(scores)) v             (B, H, L, Dv)
//   logsumexp = log(sum(exp(scores)))               (B, H, L), natural log, -inf for a row that sees no key
//
// A row that sees no key has out = 0 and passes no gradient. S == 0 is such a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace two_level_mha {

using at::Tensor;

// Layout of the tensors beside it: q (B, H, L, D), k (B, K, S, D), v (B, K, S, Dv), H % K == 0 and query head
// x reads KV head x / (H / K). Strides are free, except that the last dim is contiguous; Dv may differ from
// D.
struct AttentionParams {
  double scale = 1.0;
  std::optional<int64_t> causal;  // row l sees key s only if s <= l + *causal
  std::optional<int64_t> window;  // and only if s > l + *causal - *window; needs causal
  double softcap = 0.0;           // c > 0: x becomes c * tanh(x / c) before the mask is added
  Tensor mask;  // undefined, or 4-D broadcastable to (B, H, L, S): bool (true = attend) or additive floating
                // point
  double dropout_p = 0.0;
  Tensor seed;  // int64, one element, on q's device; defined if dropout_p > 0
  std::array<int64_t, 3> origin{0, 0,
                                0};  // global (batch, head, row) of element [0, 0, 0]: keys the dropout mask
};

using Forward = std::tuple<Tensor, Tensor>;  // out, logsumexp (float32; float64 for float64 input)
using Backward =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dmask (undefined unless asked for)

}  // namespace two_level_mha
