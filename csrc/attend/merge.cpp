// The CPU side of merge.h, its shapes, and autograd.
#include "merge.h"

#include <ATen/AccumulateType.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/isneginf.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "merge_units.h"

namespace two_level_mha {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

std::tuple<Tensor, Tensor> merge_partials_cpu(const Tensor& outs, const Tensor& logsumexps) {
  Tensor from = outs.contiguous(), lses = logsumexps.contiguous();
  Tensor out = at::empty(outs.sizes().slice(1), outs.options());
  Tensor lse = at::empty(logsumexps.sizes().slice(1), logsumexps.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, outs.scalar_type(), "merge_partials", [&] {
    using Real = at::acc_type<scalar_t, true>;  // float32 for what is narrower
    merge(from.const_data_ptr<scalar_t>(), lses.const_data_ptr<Real>(), out.mutable_data_ptr<scalar_t>(),
          lse.mutable_data_ptr<Real>(), outs.size(0), lse.numel(), outs.size(4));
  });
  return {out, lse};
}

namespace {

void check(const Tensor& outs, const Tensor& logsumexps) {
  TORCH_CHECK_VALUE(outs.dim() == 5 && logsumexps.dim() == 4,
                    "outs must be (parts, B, H, L, Dv) and logsumexps (parts, B, H, L), got ", outs.dim(),
                    "-D and ", logsumexps.dim(), "-D");
  TORCH_CHECK_VALUE(outs.sym_size(0) > 0, "there must be at least one part");
  TORCH_CHECK_VALUE(outs.sym_sizes().slice(0, 4) == logsumexps.sym_sizes(),
                    "outs and logsumexps must agree in (parts, B, H, L), got ", outs.sym_sizes(), " and ",
                    logsumexps.sym_sizes());
  TORCH_CHECK_VALUE(outs.device() == logsumexps.device(), "outs and logsumexps must be on one device, got ",
                    outs.device(), " and ", logsumexps.device());
  auto want = outs.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(logsumexps.scalar_type() == want, "logsumexps must be ", want, " for outs of ",
                    outs.scalar_type(), ", got ", logsumexps.scalar_type());
}

using Merge = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&);

template <Merge kMerge>
std::tuple<Tensor, Tensor> checked(const Tensor& outs, const Tensor& logsumexps) {
  check(outs, logsumexps);
  return kMerge(outs, logsumexps);
}

std::tuple<Tensor, Tensor> merge_partials_meta(const Tensor& outs, const Tensor& logsumexps) {
  return {at::empty_symint(outs.sym_sizes().slice(1), outs.options()),
          at::empty_symint(logsumexps.sym_sizes().slice(1), logsumexps.options())};
}

// With w_p = exp(logsumexp_p - logsumexp): grad out_p = w_p
// g, grad logsumexp_p = w_p (g . (out_p - out) + g_lse).
struct MergePartials : torch::autograd::Function<MergePartials> {
  static variable_list forward(AutogradContext* ctx, const Tensor& outs, const Tensor& logsumexps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, logsumexp] = merge_partials(outs, logsumexps);
    ctx->save_for_backward({outs, logsumexps, out, logsumexp});
    return {out, logsumexp};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = ctx->get_saved_variables();
    const Tensor &outs = saved[0], &lses = saved[1], &out = saved[2], &lse = saved[3];
    Tensor unseen = at::isneginf(lses), grad = grads[0].to(lse.scalar_type());
    Tensor weight = at::where(unseen, 0.0, at::exp(lses - lse));
    Tensor slope = (grad * (outs.to(lse.scalar_type()) - out)).sum(-1) + grads[1];
    return {(weight.unsqueeze(-1) * grad).to(outs.scalar_type()), at::where(unseen, 0.0, weight * slope)};
  }
};

std::tuple<Tensor, Tensor> merge_partials_autograd(const Tensor& outs, const Tensor& logsumexps) {
  auto merged = MergePartials::apply(outs, logsumexps);
  return {merged[0], merged[1]};
}

}  // namespace

std::tuple<Tensor, Tensor> merge_partials(const Tensor& outs, const Tensor& logsumexps) {
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("two_level_mha::merge_partials", "").typed<Merge>();
  return op.call(outs, logsumexps);
}

TORCH_LIBRARY_IMPL(two_level_mha, CPU, library) {
  library.impl("merge_partials", checked<merge_partials_cpu>);
}

#ifdef TLM_WITH_CUDA
TORCH_LIBRARY_IMPL(two_level_mha, CUDA, library) {
  library.impl("merge_partials", checked<merge_partials_cuda>);
}
#endif

TORCH_LIBRARY_IMPL(two_level_mha, Meta, library) {
  library.impl("merge_partials", checked<merge_partials_meta>);
}

TORCH_LIBRARY_IMPL(two_level_mha, Autograd, library) {
  library.impl("merge_partials", merge_partials_autograd);
}

}  // namespace two_level_mha
