#include "split_inputs.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../comm/exchange.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Over the ranks whose parts make up what this one projects.
Split split_of(const Context& context) {
  return context.takes_parts ? context.head_split() : context.split();
}

// The parts as (B, 1, length, D), and the sizes of their wholes along the dim that is split.
std::pair<std::vector<Tensor>, std::vector<c10::SymInt>> parts_of(const Inputs& inputs,
                                                                  const Context& context) {
  const Split split = split_of(context);
  const int64_t of = context.takes_parts ? context.sizes.m : 1;
  std::vector<Tensor> xs;
  std::vector<c10::SymInt> sizes;
  for (const Tensor& x : inputs.distinct) {
    xs.push_back((context.batch_first ? x : x.transpose(0, 1)).unsqueeze(1));
    sizes.push_back((split.dim == 0  ? context.sizes.B
                     : sizes.empty() ? context.sizes.L
                                     : context.sizes.given_keys()) /
                    of);
    split.check_own(xs.back(), sizes.back());
  }
  return {xs, sizes};
}

// What project_split keeps beside tensors. Those are the distinct inputs, three weights, and biases where they are.
struct SavedProjection : torch::CustomClassHolder {
  Split split;
  std::optional<at::ScalarType> reduce_dtype;
  std::vector<c10::SymInt> sizes;
  std::array<size_t, 3> at;      // the input of q, k and v
  std::array<size_t, 3> bias{};  // the number of its bias among the tensors, or 0
  size_t inputs;

  SavedProjection(const Context& context, const Inputs& inputs, std::vector<c10::SymInt> sizes)
      : split(split_of(context)),
        reduce_dtype(context.reduce_dtype),
        sizes(std::move(sizes)),
        at(inputs.at),
        inputs(inputs.distinct.size()) {}
};

// (B, heads, length, E) as the product of the projection, (B * length, heads * E).
Tensor rows_of(const Tensor& grad) {
  return grad.transpose(1, 2).flatten(2).flatten(0, 1);
}

struct ProjectSplit : torch::autograd::Function<ProjectSplit> {
  static variable_list forward(AutogradContext* ctx, at::TensorList all,
                               const c10::intrusive_ptr<SavedProjection>& how) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(all.vec());
    ctx->saved_data["how"] = c10::IValue::make_capsule(how);
    at::AutoDispatchBelowADInplaceOrView guard;
    std::vector<Tensor> whole = all_parts(all.slice(0, how->inputs), how->sizes, how->split);
    for (Tensor& x : whole) x = x.squeeze(1);
    auto bias = [&](size_t i) {
      return how->bias[i] == 0 ? std::nullopt : std::optional<Tensor>(all[how->bias[i]]);
    };
    const size_t w = how->inputs;
    auto [q, k, v] = qkv_projection(whole[how->at[0]], whole[how->at[1]], whole[how->at[2]],
                                    {all[w], all[w + 1], all[w + 2], bias(0), bias(1), bias(2)}, true);
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto how = c10::static_intrusive_pointer_cast<SavedProjection>(ctx->saved_data["how"].toCapsule());
    const variable_list all = ctx->get_saved_variables();
    const size_t w = how->inputs;
    variable_list out(all.size() + 1), of_inputs(w);
    bool trained = false;
    for (size_t i = 0; i < 3; ++i) {
      once_differentiable(grads[i]);
      trained = trained || (grads[i].defined() && ctx->needs_input_grad(w + i));
    }
    std::vector<Tensor> whole;
    if (trained) whole = all_parts(at::TensorList(all).slice(0, w), how->sizes, how->split);
    for (size_t i = 0; i < 3; ++i) {
      if (!grads[i].defined()) continue;
      const Tensor grad = rows_of(grads[i]), weight = all[w + i].flatten(0, 1);
      const size_t input = how->at[i];
      if (ctx->needs_input_grad(w + i)) {
        const Tensor x = whole[input].flatten(0, 2).to(grad.scalar_type());
        out[w + i] = grad.t().mm(x).view_symint(all[w + i].sym_sizes()).to(weight.scalar_type());
      }
      if (const size_t bias = how->bias[i]; bias != 0 && ctx->needs_input_grad(bias))
        out[bias] = grad.sum(0).view_symint(all[bias].sym_sizes()).to(all[bias].scalar_type());
      if (!ctx->needs_input_grad(input)) continue;
      const auto sizes = grads[i].sym_sizes();
      Tensor of_input = grad.mm(weight.to(grad.scalar_type()))
                            .view_symint({sizes[0], 1, sizes[2], weight.sym_size(1)})
                            .to(all[input].scalar_type());
      of_inputs[input] = of_inputs[input].defined() ? of_inputs[input] + of_input : of_input;
    }
    std::vector<Tensor> defined;
    for (const Tensor& grad : of_inputs)
      if (grad.defined()) defined.push_back(grad);
    if (defined.empty()) return out;
    defined = sum_parts(defined, how->split, how->reduce_dtype, std::nullopt).first;
    size_t next = 0;
    for (size_t i = 0; i < w; ++i)
      if (of_inputs[i].defined()) out[i] = defined[next++];
    return out;
  }
};

}  // namespace

std::vector<Tensor> whole_inputs(const Inputs& inputs, const Context& context) {
  const auto [xs, sizes] = parts_of(inputs, context);
  std::vector<Tensor> whole = gather_split(xs, sizes, context.split());
  for (Tensor& x : whole) x = x.squeeze(1);
  return whole;
}

std::tuple<Tensor, Tensor, Tensor> project_split(const Inputs& inputs, const QkvWeights& weights,
                                                 const Context& context) {
  auto [all, sizes] = parts_of(inputs, context);
  const auto how = c10::make_intrusive<SavedProjection>(context, inputs, sizes);
  all.insert(all.end(), {weights.q, weights.k, weights.v});
  const std::array<const std::optional<Tensor>*, 3> biases{&weights.q_bias, &weights.k_bias, &weights.v_bias};
  for (size_t i = 0; i < 3; ++i) {
    if (!*biases[i]) continue;
    how->bias[i] = all.size();
    all.push_back(**biases[i]);
  }
  variable_list found = ProjectSplit::apply(at::TensorList(all), how);
  return {found[0], found[1], found[2]};
}

}  // namespace two_level_mha
