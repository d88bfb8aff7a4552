#include "merge.h"

#include <ATen/AccumulateType.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "merge_row.h"

namespace two_level_mha {

namespace {

template <typename Scalar, typename Real>
void merge(const Scalar* outs, const Real* lses, Scalar* out, Real* lse, int64_t parts, int64_t rows,
           int64_t width) {
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    std::vector<Real> sum(width);
    for (int64_t row = begin; row < end; row++) {
      lse[row] = merged_logsumexp(lses + row, parts, rows);
      std::fill(sum.begin(), sum.end(), Real(0));
      for (int64_t p = 0; p < parts; p++) {
        if (std::isinf(lses[p * rows + row])) continue;
        Real weight = merge_weight(lses[p * rows + row], lse[row]);
        const Scalar* part = outs + (p * rows + row) * width;
        for (int64_t d = 0; d < width; d++) sum[d] += weight * Real(part[d]);
      }
      for (int64_t d = 0; d < width; d++) out[row * width + d] = Scalar(sum[d]);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> merge_partials_cpu(const at::Tensor& outs, const at::Tensor& logsumexps) {
  at::Tensor from = outs.contiguous(), lses = logsumexps.contiguous();
  at::Tensor out = at::empty(outs.sizes().slice(1), outs.options());
  at::Tensor lse = at::empty(logsumexps.sizes().slice(1), logsumexps.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, outs.scalar_type(), "merge_partials", [&] {
    using Real = at::acc_type<scalar_t, true>;  // float32 for what is narrower
    merge(from.const_data_ptr<scalar_t>(), lses.const_data_ptr<Real>(), out.mutable_data_ptr<scalar_t>(),
          lse.mutable_data_ptr<Real>(), outs.size(0), lse.numel(), outs.size(4));
  });
  return {out, lse};
}

}  // namespace two_level_mha
