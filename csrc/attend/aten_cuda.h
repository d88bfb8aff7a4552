// Attention on CUDA through the kernels that ATen carries; see attention.h for the contract and aten_cuda.cpp
// for the table of what serves what. Compiled only, not run.
#pragma once

#include "attention.h"

namespace two_level_mha {

bool aten_cuda_supports(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

Forward aten_cuda_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

// grad_logsumexp may be undefined. The mask's gradient is not computed here.
Backward aten_cuda_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                            const AttentionParams& params);

}  // namespace two_level_mha
