// Attention in blocks of rows through ATen ops: any device, dtype
// and feature. Serves what no kernel serves; float64 among it.
#pragma once

#include "scores.h"

namespace two_level_mha {

Forward chunked_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params,
                        Halves halves);
// Half precision goes into products as it is on CUDA, elsewhere widened.
Forward chunked_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

// grad_logsumexp may be undefined; dmask has the shape of params.mask.
Backward chunked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params, Halves halves);
Backward chunked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params);

}  // namespace two_level_mha
