#include "split_linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "exchange.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// What is kept beside the tensors: x, the weights, and the biases where they are.
struct SavedLinears : torch::CustomClassHolder {
  Split split;
  c10::SymInt size;
  std::optional<at::ScalarType> reduce_dtype;
  std::vector<size_t> bias;  // the number of each linear's among the tensors, or 0

  SavedLinears(const Split& split, const c10::SymInt& size, std::optional<at::ScalarType> reduce_dtype)
      : split(split), size(size), reduce_dtype(reduce_dtype) {}

  Later<std::vector<Tensor>> begin_whole(const Tensor& x) const {
    return begin_all_parts({x.unsqueeze(1)}, {size}, split);
  }
};

struct ProjectLinears : torch::autograd::Function<ProjectLinears> {
  static variable_list forward(AutogradContext* ctx, at::TensorList all,
                               const c10::intrusive_ptr<SavedLinears>& how) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(all.vec());
    ctx->saved_data["how"] = c10::IValue::make_capsule(how);
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor whole = how->begin_whole(all[0])()[0].squeeze(1);
    variable_list products;
    for (size_t i = 0; i < how->bias.size(); ++i)
      products.push_back(
          at::linear(whole, all[1 + i], how->bias[i] == 0 ? std::nullopt : std::optional(all[how->bias[i]])));
    return products;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto how = c10::static_intrusive_pointer_cast<SavedLinears>(ctx->saved_data["how"].toCapsule());
    const variable_list all = ctx->get_saved_variables();
    variable_list out(all.size() + 1);
    bool trained = false;
    for (size_t i = 0; i < grads.size(); ++i) {
      once_differentiable(grads[i]);
      if (grads[i].defined()) grads[i] = grads[i].flatten(0, 1);
      trained = trained || (grads[i].defined() && ctx->needs_input_grad(1 + i));
    }
    // the whole comes while the gradient of x is computed, whose sum goes on while those of the weights are
    Later<std::vector<Tensor>> whole, sum;
    if (trained) whole = how->begin_whole(all[0]);
    Tensor of_whole;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined() || !ctx->needs_input_grad(0)) continue;
      const Tensor product = grads[i].mm(all[1 + i]);
      of_whole = of_whole.defined() ? of_whole.add_(product) : product;
    }
    if (of_whole.defined()) {
      auto sizes = all[0].sym_sizes().vec();
      sizes[how->split.dim == 2 ? 1 : 0] = how->size;
      std::vector<Tensor> summed{of_whole.view_symint(sizes).unsqueeze(1)};
      of_whole = Tensor();
      sum = begin_sum_parts(std::move(summed), how->split, how->reduce_dtype, std::nullopt);
    }
    const Tensor x = trained ? arrived(whole)[0].flatten(0, 2) : Tensor();
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) continue;
      if (ctx->needs_input_grad(1 + i)) out[1 + i] = grads[i].t().mm(x);
      if (const size_t bias = how->bias[i]; bias != 0 && ctx->needs_input_grad(bias))
        out[bias] = grads[i].sum(0);
    }
    if (sum) out[0] = arrived(sum)[0].squeeze(1);
    return out;
  }
};

}  // namespace

std::vector<Tensor> project_linears(const Tensor& x, const std::vector<Linear>& linears,
                                    const c10::SymInt& size, const Split& split,
                                    std::optional<at::ScalarType> reduce_dtype) {
  const auto how = c10::make_intrusive<SavedLinears>(split, size, reduce_dtype);
  std::vector<Tensor> all{x};
  for (const Linear& linear : linears) all.push_back(linear.weight);
  for (const Linear& linear : linears) {
    how->bias.push_back(linear.bias ? all.size() : 0);
    if (linear.bias) all.push_back(*linear.bias);
  }
  return ProjectLinears::apply(at::TensorList(all), how);
}

}  // namespace two_level_mha
