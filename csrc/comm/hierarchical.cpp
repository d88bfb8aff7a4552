#include "hierarchical.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "exchange.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

struct Stages : torch::CustomClassHolder {
  std::vector<GatherStage> stages;
  bool reversed, replicated;
  std::optional<Seal> seal;

  Stages(const std::vector<GatherStage>& stages, bool reversed, bool replicated,
         const std::optional<Seal>& seal)
      : stages(stages), reversed(reversed), replicated(replicated), seal(seal) {}

  int64_t ranks() const {
    int64_t found = 1;
    for (const GatherStage& stage : stages) found *= stage.group.size;
    return found;
  }

  // Indices of the stages in the order in which they are gathered.
  std::vector<int64_t> order() const {
    std::vector<int64_t> found;
    for (size_t i = 0; i < stages.size(); ++i) found.push_back(i);
    if (reversed) std::reverse(found.begin(), found.end());
    return found;
  }
};

// x of any shape -> (g, ...), and the other way a rank's piece of the sum.
Tensor gather_stage(const Tensor& x, const Group& group) {
  if (group.size == 1) return x.unsqueeze(0);
  auto sizes = x.sym_sizes().vec();
  sizes.insert(sizes.begin(), group.size);
  return run(Collective::all_gather, x.reshape({1, -1}), group).view_symint(sizes);
}

// The same with a seal's digits behind x, which become the sums of the group.
Tensor gather_stage_sealed(const Tensor& x, Tensor& digits, const Group& group) {
  if (group.size == 1) return x.unsqueeze(0);
  auto sizes = x.sym_sizes().vec();
  sizes.insert(sizes.begin(), group.size);
  const auto elements = x.sym_numel();
  Tensor all = run(Collective::all_gather, with_digits(x, digits).unsqueeze(0), group);
  digits = all.narrow_symint(1, elements, digits.size(0)).sum(0, false, digits.scalar_type());
  return all.narrow_symint(1, 0, elements).reshape_symint(sizes);
}

Tensor scatter_stage(const Tensor& parts, const Group& group) {
  if (group.size == 1) return parts.squeeze(0);
  auto sizes = parts.sym_sizes().slice(1).vec();
  return run(Collective::reduce_scatter, parts.reshape({group.size, -1}), group).view_symint(sizes);
}

// Where the dims of the gathered tensor are, a dim of each stage before the one it is gathered along: of
// `parts`, whose first dims are the stages', the last gathered one first.
std::vector<int64_t> dims_of(const Stages& call, int64_t ndim) {
  const int64_t count = call.stages.size();
  const auto order = call.order();
  std::vector<int64_t> dims;
  for (int64_t dim = 0; dim < ndim; ++dim) {
    for (int64_t stage = 0; stage < count; ++stage)
      if (call.stages[stage].dim == dim)
        dims.push_back(count - 1 - (std::find(order.begin(), order.end(), stage) - order.begin()));
    dims.push_back(count + dim);
  }
  return dims;
}

// What one rank holds along `dim` of the whole, or what the whole holds of the piece.
int64_t pieces(const Stages& call, int64_t dim) {
  int64_t found = 1;
  for (const GatherStage& stage : call.stages)
    if (stage.dim == dim) found *= stage.group.size;
  return found;
}

struct HierarchicalAllGather : torch::autograd::Function<HierarchicalAllGather> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const c10::intrusive_ptr<Stages>& call) {
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor parts = x.contiguous();
    if (call->seal) {
      Tensor digits = digits_of(*call->seal, x);
      for (int64_t stage : call->order())
        parts = gather_stage_sealed(parts, digits, call->stages[stage].group);
      parts = opened(parts, digits, *call->seal);
    } else {
      for (int64_t stage : call->order()) parts = gather_stage(parts, call->stages[stage].group);
    }
    auto sizes = x.sym_sizes().vec();
    for (int64_t dim = 0; dim < x.dim(); ++dim) sizes[dim] = sizes[dim] * pieces(*call, dim);
    Tensor whole = parts.permute(dims_of(*call, x.dim())).reshape_symint(sizes);
    return whole.is_alias_of(x) ? whole.clone() : whole;  // a function must not return a view of its input
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once_differentiable(grads[0]);
    auto call = c10::static_intrusive_pointer_cast<Stages>(ctx->saved_data["call"].toCapsule());
    Tensor grad = grads[0];
    if (call->replicated) {
      for (const GatherStage& stage : call->stages) {
        auto size = grad.sym_size(stage.dim) / stage.group.size;
        grad = grad.narrow_symint(stage.dim, size * stage.group.rank, size);
      }
      return {grad.contiguous(), Tensor()};
    }
    std::vector<c10::SymInt> sizes;
    for (int64_t dim = 0; dim < grad.dim(); ++dim) {
      for (const GatherStage& stage : call->stages)
        if (stage.dim == dim) sizes.push_back(stage.group.size);
      sizes.push_back(grad.sym_size(dim) / pieces(*call, dim));
    }
    const auto dims = dims_of(*call, grad.dim());
    std::vector<int64_t> back(dims.size());
    for (size_t i = 0; i < dims.size(); ++i) back[dims[i]] = i;
    grad = grad.reshape_symint(sizes).permute(back);
    auto order = call->order();
    std::reverse(order.begin(), order.end());
    for (int64_t stage : order) grad = scatter_stage(grad.contiguous(), call->stages[stage].group);
    return {grad, Tensor()};
  }
};

}  // namespace

Tensor hierarchical_all_gather(const Tensor& x, const std::vector<GatherStage>& stages, bool reversed,
                               bool replicated, const std::optional<Seal>& seal) {
  auto call = c10::make_intrusive<Stages>(stages, reversed, replicated, seal);
  return call->ranks() == 1 ? x : HierarchicalAllGather::apply(x, call);
}

}  // namespace two_level_mha
