// How rows of q, k, v and of results lie in memory, for whoever makes or reads them.
#pragma once

#include <ATen/ops/empty.h>

namespace two_level_mha {

// Uninitialised (B, H, L, D) whose memory is (B, L, H, D), so that heads can be merged without a copy: how
// every kernel leaves its results.
inline at::Tensor empty_rows(const at::Tensor& like, c10::SymInt B, c10::SymInt H, c10::SymInt L,
                             c10::SymInt D) {
  return at::empty_symint({B, L, H, D}, like.options()).transpose(1, 2);
}

// x (B, H, L, D) in such memory, without a copy where it lies so already.
inline at::Tensor as_rows(const at::Tensor& x) {
  return x.transpose(1, 2).contiguous().transpose(1, 2);
}

// x with rows that can be read in place. An expanded gradient, of a sum for one, has none.
inline at::Tensor with_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 && x.stride(-2) >= x.size(-1) ? x : x.contiguous();
}

}  // namespace two_level_mha
