// Blocked exact attention on the CPU: fp32, bf16, fp16; see contract.h for the contract.
#pragma once

#include "../contract.h"

namespace two_level_mha {

Forward blocked_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

// grad_logsumexp may be undefined. The mask's gradient is not computed here.
Backward blocked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params);

}  // namespace two_level_mha
