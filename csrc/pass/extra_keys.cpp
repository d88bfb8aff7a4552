#include "extra_keys.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include "../base/sizes.h"

namespace two_level_mha {

Tensor with_extra_keys(const Tensor& x, const std::optional<Tensor>& bias, bool zero) {
  std::vector<Tensor> rows{x};
  auto add = [&](const Tensor& row) {
    rows.push_back(row.to(x.scalar_type())
                       .unsqueeze(1)
                       .unsqueeze(0)
                       .expand_symint({x.sym_size(0), x.sym_size(1), 1, x.sym_size(3)}));
  };
  if (bias) add(*bias);
  if (zero) add(at::zeros({fixed_size(x, 1), fixed_size(x, 3)}, x.options()));
  return rows.size() == 1 ? x : at::cat(rows, 2);
}

}  // namespace two_level_mha
