// Attention on the CPU through ATen's flash kernel, which multiplies half precision with AMX; see contract.h
// for the contract. AMX itself has not been run.
#pragma once

#include "../contract.h"

namespace two_level_mha {

Forward aten_cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

// ATen's has no gradient of the logsumexp: grad_logsumexp is undefined.
Backward aten_cpu_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                           const AttentionParams& params);

}  // namespace two_level_mha
