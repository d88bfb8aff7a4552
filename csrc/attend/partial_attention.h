// The op two_level_mha::partial_attention as a C++ function: differentiable, any device, symbolic sizes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "dropout_mask.h"

namespace two_level_mha {

using at::Tensor;

// The arguments of the op that are not q, k, v; contract.h
// says what they mean. mask is broadcastable to (B, H, L, S).
struct Attend {
  std::optional<Tensor> mask;
  std::optional<double> scale;  // default 1 / sqrt(D)
  std::optional<c10::SymInt> causal, window;
  double softcap = 0.0, dropout_p = 0.0;
  std::optional<Tensor> seed;
  std::array<c10::SymInt, 3> origin{0, 0, 0};
  c10::SymInt key_stride = 1;
  // Name of the kernel that must serve the call (kernels.h), and,
  // where it has one, its backward; "": the fastest that can.
  std::string kernel = "";
};

// Raises ValueError for a mask that is neither bool nor of a dtype that attention is computed in.
void check_mask_dtype(const Tensor& mask);
// Raises ValueError unless q, k, v and options are a call.
void check_attention(const Attend& options, const Tensor& q, const Tensor& k, const Tensor& v);
// The same call by numbers that no arithmetic on positions or scores takes out of range.
Attend in_range(Attend options);

// -> out (B, H, L, Dv), logsumexp (B, H, L)
std::tuple<Tensor, Tensor> partial_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Attend& options);

}  // namespace two_level_mha
