#pragma once

#include <ATen/core/Tensor.h>

namespace two_level_mha {

// The size of a dim that is a constant of the layer, such as heads: under tracing only this dim is
// specialised, where x.size(dim) would specialise every dim of x.
inline int64_t fixed_size(const at::Tensor& x, int64_t dim) {
  return x.sym_size(dim).guard_int(__FILE__, __LINE__);
}

}  // namespace two_level_mha
