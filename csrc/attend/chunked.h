// Attention in blocks of rows through ATen ops: any device, dtype and feature, never L x S at once. Serves
// what no kernel serves; float64 among it.
#pragma once

#include "attention.h"

namespace two_level_mha {

Forward chunked_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

// grad_logsumexp may be undefined; the last output is undefined unless mask_grad, else of params.mask's
// shape.
Backward chunked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params, bool mask_grad);

// The sum of exp(score - logsumexp) over the keys of each row (B, H, L): 1, but for what rounding took from
// logsumexp; NaN for a row that sees no key.
Tensor weight_sums(const Tensor& q, const Tensor& k, const Tensor& logsumexp, const AttentionParams& params);

// Uninitialised (B, H, L, D) whose memory is (B, L, H, D), so that heads can be merged without a copy.
Tensor empty_rows(const Tensor& like, c10::SymInt B, c10::SymInt H, c10::SymInt L, c10::SymInt D);

}  // namespace two_level_mha
