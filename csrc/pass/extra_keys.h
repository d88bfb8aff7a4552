// Keys and values of no token, which every query sees: nn.MultiheadAttention's add_bias_kv and add_zero_attn.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace two_level_mha {

using at::Tensor;

struct ExtraKeys {
  std::optional<Tensor> bias_k, bias_v;  // (K, E)
  bool zero = false;
};

// Keys or values x (B, K, S, width) and after them `bias`, (K, width), and zeros.
Tensor with_extra_keys(const Tensor& x, const std::optional<Tensor>& bias, bool zero);

}  // namespace two_level_mha
