#include "hide.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>

#include <limits>

namespace two_level_mha {

using at::Tensor;

Tensor last_positions(const Tensor& like, const c10::SymInt& causal, const c10::SymInt& first,
                      const c10::SymInt& rows) {
  return at::arange(first, first + rows, like.options().dtype(at::kLong)) + causal;
}

Tensor hide(const Tensor& scores, const SymVisible& visible, const c10::SymInt& first_row,
            const c10::SymInt& first_key) {
  if (!visible.causal) return scores;
  const Tensor last = last_positions(scores, *visible.causal, first_row, scores.sym_size(-2)).unsqueeze(1);
  const Tensor position = at::arange(first_key, first_key + scores.sym_size(-1), last.options());
  const Tensor at = position * visible.key_stride;
  Tensor hidden = at > last;
  if (visible.window) hidden = hidden.logical_or(at <= last - *visible.window);
  return scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
}

}  // namespace two_level_mha
