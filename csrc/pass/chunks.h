// Tensors in chunks of the batch and together again: csrc/plan/schemes.h says which sequences a chunk has.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../plan/schemes.h"

namespace two_level_mha {

using at::Tensor;

// x, whose batch is `dim`, chunk by chunk; x itself if there is one.
std::vector<Tensor> in_chunks(const Tensor& x, int64_t dim, const Chunking& chunks);
Tensor from_chunks(const std::vector<Tensor>& xs, int64_t dim, const Chunking& chunks);

}  // namespace two_level_mha
