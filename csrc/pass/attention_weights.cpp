#include "attention_weights.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../base/sizes.h"

#include "../comm/exchange.h"
#include "../comm/hierarchical.h"
#include "../comm/pack.h"
#include "../comm/replicated.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The whole slice group holds the same weights: the gradient of the copies that are not `kept` is dropped.
struct KeepGradient : torch::autograd::Function<KeepGradient> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, bool kept) {
    ctx->saved_data["kept"] = kept;
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once_differentiable(grads[0]);
    return {ctx->saved_data["kept"].toBool() ? grads[0] : at::zeros_like(grads[0]), Tensor()};
  }
};

// Pieces sharded along `dim` over the slice group -> the
// whole, used alike by every rank: the adjoint is one's own.
struct GatherSharded : torch::autograd::Function<GatherSharded> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, std::vector<c10::SymInt> whole, int64_t dim,
                        bool zigzag, const Group& group, int64_t slice) {
    ctx->saved_data["where"] = std::vector<int64_t>{dim, zigzag, group.size, slice};
    ctx->saved_data["sizes"] = std::vector<c10::SymInt>(x.sym_sizes().vec());
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor buffer = run(Collective::all_gather, x.reshape({1, -1}), group);
    return unpack(buffer, whole, {dim}, group.size, zigzag)[0];
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once_differentiable(grads[0]);
    auto where = ctx->saved_data["where"].toIntVector();
    Tensor parts = pack({grads[0]}, {where[0]}, where[2], where[1]);
    Tensor mine = parts.select(0, where[3]).view_symint(ctx->saved_data["sizes"].toSymIntVector());
    return {mine, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor gather_weights(const Tensor& weights, const Context& context, bool average) {
  const Groups& groups = context.groups;
  const int64_t n = context.sizes.n, m = context.sizes.m, local = fixed_size(weights, 1);
  if (context.row.q == Move::keep) {  // heads of this rank alone: whole ones, or those of d / m width
    if (average) {
      Tensor sum = reduce_replicated(weights.sum(1), over_grid(groups), context.reduce_dtype);
      return sum / double(local * n * m);
    }
    const bool whole_heads = context.row.storage == Storage::whole_heads;
    return hierarchical_all_gather(weights.unsqueeze(whole_heads ? 1 : 2),
                                   {{1, groups.head}, {2, groups.slice}},
                                   /*reversed=*/false, /*replicated=*/true)
        .flatten(1, 2);
  }
  Tensor whole = weights;
  const int64_t dim = context.sharded_dim();
  if (dim >= 0) {
    std::vector<c10::SymInt> sizes = weights.sym_sizes().vec();
    sizes[dim] = dim == 0 ? context.sizes.B : context.sizes.L;
    whole = GatherSharded::apply(weights, sizes, dim, context.zigzag(), groups.slice, context.slice);
  } else if (m > 1) {
    whole = KeepGradient::apply(weights, context.slice == 0);
  }
  if (!average) return hierarchical_all_gather(whole, {{1, groups.head}}, false, true);
  if (n == 1) return whole.mean(1);
  return reduce_replicated(whole.sum(1), {groups.head, {}}, context.reduce_dtype) / double(local * n);
}

}  // namespace two_level_mha
