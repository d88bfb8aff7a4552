// Attention on the CPU through ATen's flash kernel, which multiplies half precision with AMX; see attention.h
// for the contract. AMX itself has not been run.
#pragma once

#include "attention.h"

namespace two_level_mha {

// Whether ATen's kernel answers this call as the contract has it. It refuses d_v != d_qk and dropout, dies of
// S = 0, starts causal masks in the top-left corner and gives 0 as the logsumexp of a row that sees no key.
bool aten_cpu_fits(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

// The same, on a CPU where it is faster than the blocked kernel.
bool aten_cpu_supports(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

Forward aten_cpu_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

// grad_logsumexp may be undefined.
Backward aten_cpu_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                           const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                           const AttentionParams& params);

}  // namespace two_level_mha
