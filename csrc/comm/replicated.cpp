#include "replicated.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/split_with_sizes.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include "../base/arithmetic.h"
#include "../base/sizes.h"
#include "../plan/traffic.h"
#include "exchange.h"
#include "requires_grad.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

struct SavedGroups : torch::CustomClassHolder {
  SumGroups groups;
  std::optional<at::ScalarType> reduce_dtype;

  SavedGroups(const SumGroups& groups, std::optional<at::ScalarType> reduce_dtype)
      : groups(groups), reduce_dtype(reduce_dtype) {}
};

bool in_stages(const Tensor& x, const SumGroups& groups) {
  return !groups.axes.empty() &&
         !sums_flat(x.sym_numel(), groups.axes[1].size, groups.axes[0].size, groups.node);
}

Later<Tensor> begin_sum_in_stages(const Tensor& x, const SumGroups& groups) {
  const Group near = groups.axes[0], far = groups.axes[1];
  auto elements = x.sym_numel();
  auto padded = ceil_div(elements, near.size) * near.size;
  Tensor flat = pad_dim(x.reshape(-1), 0, 0, padded - elements).view_symint({near.size, padded / near.size});
  struct Coming {
    Later<Tensor> stage;
    int begun = 1;
  };
  auto coming = std::make_shared<Coming>(Coming{begin_run(Collective::reduce_scatter, flat, near)});
  auto advance = [=] {
    if (coming->begun == 3) return false;
    const Tensor came = arrived(coming->stage);
    coming->stage = ++coming->begun == 2 ? begin_sum_in_group(came, far, /*own=*/true)
                                         : begin_run(Collective::all_gather, came, near);
    return true;
  };
  return {[=, sizes = x.sym_sizes().vec()] {
            while (advance()) continue;
            return arrived(coming->stage).view(-1).narrow_symint(0, 0, elements).view_symint(sizes);
          },
          advance};
}

Later<Tensor> begin_sum(const Tensor& x, const SumGroups& groups, bool own) {
  return in_stages(x, groups) ? begin_sum_in_stages(x, groups) : begin_sum_in_group(x, groups.all, own);
}

struct EnterReplicated : torch::autograd::Function<EnterReplicated> {
  static variable_list forward(AutogradContext* ctx, at::TensorList xs,
                               const c10::intrusive_ptr<SavedGroups>& saved) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["groups"] = c10::IValue::make_capsule(saved);
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list out;
    for (const Tensor& x : xs) {
      out.push_back(x.view_as(x));
      // below ADInplaceOrView a view counts its own changes: what saves it would not see those of x
      torch::autograd::impl::set_version_counter(out.back(), torch::autograd::impl::version_counter(x));
    }
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto saved = c10::static_intrusive_pointer_cast<SavedGroups>(ctx->saved_data["groups"].toCapsule());
    std::vector<Tensor> flat;
    std::vector<c10::SymInt> lengths;
    for (const Tensor& grad : grads)
      if (grad.defined()) {
        flat.push_back(grad.reshape(-1));
        lengths.push_back(grad.sym_numel());
      }
    variable_list out(grads.size() + 1);
    if (flat.empty()) return out;
    const bool copied = flat.size() > 1;
    Tensor sum = sum_over(copied ? at::cat(flat) : flat[0], saved->groups, saved->reduce_dtype, copied);
    std::vector<Tensor> parts = at::split_with_sizes_symint(sum, lengths);
    size_t next = 0;
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) out[i] = parts[next++].view_symint(grads[i].sym_sizes());
    return out;
  }
};

}  // namespace

Later<Tensor> begin_sum_over(const Tensor& x, const SumGroups& groups,
                             std::optional<at::ScalarType> reduce_dtype, bool own) {
  if (groups.all.size == 1) return [=] { return x; };
  once_differentiable(x);
  Tensor y = reduce_dtype ? x.to(*reduce_dtype) : x;
  auto sum = begin_sum(y, groups, own || !y.is_same(x));
  return then(sum, [dtype = x.scalar_type()](const Tensor& y) { return y.to(dtype); });
}

Tensor sum_over(const Tensor& x, const SumGroups& groups, std::optional<at::ScalarType> reduce_dtype,
                bool own) {
  return begin_sum_over(x, groups, reduce_dtype, own)();
}

Later<Tensor> begin_reduce_replicated(const Tensor& x, const SumGroups& groups,
                                      std::optional<at::ScalarType> reduce_dtype,
                                      const std::optional<Seal>& seal) {
  if (groups.all.size == 1) return [=] { return x; };
  auto forward = [=](const std::vector<Tensor>& xs) -> Later<Tensor> {
    if (!seal) return begin_sum_over(xs[0], groups, reduce_dtype, /*own=*/false);
    Tensor mine = reduce_dtype ? xs[0].to(*reduce_dtype) : xs[0];
    const Tensor digits = digits_of(*seal, mine);
    auto coming = begin_sum(with_digits(mine, digits), groups, /*own=*/true);
    return then(coming, [=, sizes = xs[0].sym_sizes().vec(), elements = xs[0].sym_numel(),
                         count = digits.size(0), dtype = xs[0].scalar_type()](const Tensor& sums) {
      Tensor y = sums.narrow_symint(0, 0, elements).view_symint(sizes);
      return opened(y, sums.narrow_symint(0, elements, count), *seal).to(dtype);
    });
  };
  return begin({x}, forward, [](const Tensor& gradient) -> Later<std::vector<Tensor>> {
    return [=] { return std::vector<Tensor>{gradient}; };
  });
}

Tensor reduce_replicated(const Tensor& x, const SumGroups& groups,
                         std::optional<at::ScalarType> reduce_dtype) {
  return begin_reduce_replicated(x, groups, reduce_dtype, std::nullopt)();
}

std::vector<Tensor> enter_replicated(const std::vector<Tensor>& xs, const SumGroups& groups,
                                     std::optional<at::ScalarType> reduce_dtype) {
  if (groups.all.size == 1) return xs;
  return where_requires_grad(xs, [&](at::TensorList trained) {
    return EnterReplicated::apply(trained, c10::make_intrusive<SavedGroups>(groups, reduce_dtype));
  });
}

}  // namespace two_level_mha
