// The dropout mask of dropout.h as a tensor, for paths whose kernel does not draw it on the fly.
#pragma once

#include <ATen/core/Tensor.h>

namespace two_level_mha {

// sizes (b, h, l, s) -> bool (b, h, l, s), true = kept. origin: global (batch, head, row) of element [0, 0,
// 0]; columns start at 0. seed: int64, one element, on the device of the result; it is read there, never on
// the host of a GPU.
// The op: any device, symbolic sizes.
at::Tensor dropout_keep_mask(const at::Tensor& seed, double p, c10::SymIntArrayRef sizes,
                             c10::SymIntArrayRef origin);

at::Tensor dropout_keep_mask_cpu(const at::Tensor& seed, double p, at::IntArrayRef sizes,
                                 at::IntArrayRef origin);
at::Tensor dropout_keep_mask_cuda(const at::Tensor& seed, double p, at::IntArrayRef sizes,
                                  at::IntArrayRef origin);

}  // namespace two_level_mha
