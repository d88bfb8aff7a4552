// The op two_level_mha::partial_attention as a C++ function: differentiable, any device, symbolic sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace two_level_mha {

using at::Tensor;

// The arguments of the op that are not q, k, v; attention.h says what they mean. mask is broadcastable to (B,
// H, L, S).
struct Attend {
  std::optional<Tensor> mask;
  std::optional<double> scale;  // default 1 / sqrt(D)
  std::optional<c10::SymInt> causal, window;
  double softcap = 0.0, dropout_p = 0.0;
  std::optional<Tensor> seed;
  std::array<c10::SymInt, 3> origin{0, 0, 0};
  c10::SymInt key_stride = 1;
};

// -> out (B, H, L, Dv), logsumexp (B, H, L)
std::tuple<Tensor, Tensor> partial_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Attend& options);

// bool (b, h, l, s): which elements dropout keeps; sizes (b, h, l, s), origin (batch, head, row).
Tensor dropout_keep_mask(const Tensor& seed, double p, c10::SymIntArrayRef sizes, c10::SymIntArrayRef origin);

}  // namespace two_level_mha
