#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>

#include <vector>

namespace two_level_mha {

// The size of a dim that is a constant of the layer, such as heads: under tracing only this dim is
// specialised, where x.size(dim) would specialise every dim of x.
inline int64_t fixed_size(const at::Tensor& x, int64_t dim) {
  return x.sym_size(dim).guard_int(__FILE__, __LINE__);
}

// x with `before` and `after` rows of `fill` around `dim`; x itself, not a copy, where
// both are known to be none.
inline at::Tensor pad_dim(const at::Tensor& x, int64_t dim, const c10::SymInt& before,
                          const c10::SymInt& after, double fill = 0.0) {
  if (before.maybe_as_int() == 0 && after.maybe_as_int() == 0) return x;
  std::vector<c10::SymInt> pad(2 * (x.dim() - dim), 0);
  pad[pad.size() - 2] = before, pad.back() = after;
  return at::constant_pad_nd_symint(x, pad, fill);
}

}  // namespace two_level_mha
