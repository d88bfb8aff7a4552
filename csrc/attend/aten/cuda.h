// Attention on CUDA through the kernels that ATen carries, one after the other; see contract.h for the
// contract and ../kernels.h for what each serves. Emulated only: tests answer in the place of those kernels.
#pragma once

#include "../contract.h"

namespace two_level_mha {

Forward cudnn_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);
Backward cudnn_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                        const AttentionParams& params);

Forward flash_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);
Backward flash_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                        const AttentionParams& params);

Forward efficient_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);
Backward efficient_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                            const AttentionParams& params);

}  // namespace two_level_mha
