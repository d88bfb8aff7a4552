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

#include <array>
#include <cstdint>
#include <tuple>

#include "visible.h"

namespace two_level_mha {

using at::Tensor;

// Layout of the tensors beside it: q (B, H, L, D), k (B, K, S, D), v (B, K,
// S, Dv), H % K == 0 and query head x reads KV head x / (H / K). Strides
// are free, except that the last dim is contiguous; Dv may differ from D.
struct AttentionParams : Visible {  // key_stride is 1 if dropout_p > 0
  double scale = 1.0;
  double softcap = 0.0;  // c > 0: x becomes c * tanh(x / c) before the mask is added
  // Undefined, or 4-D broadcastable to (B, H, L, S): bool (true = attend) or additive floating point.
  Tensor mask;
  bool mask_grad = false;  // of a backward: whether dmask is asked for
  double dropout_p = 0.0;
  Tensor seed;  // int64, one element, on q's device; defined if dropout_p > 0
  // Global (batch, head, row) of element [0, 0, 0]: keys the dropout mask.
  std::array<int64_t, 3> origin{0, 0, 0};
};

using Forward = std::tuple<Tensor, Tensor>;  // out, logsumexp (float32; float64 for float64 input)
// dq, dk, dv, dmask (undefined unless asked for)
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

}  // namespace two_level_mha
