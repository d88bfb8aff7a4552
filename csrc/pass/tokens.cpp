#include "tokens.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../comm/exchange.h"
#include "../comm/pack.h"
#include "../comm/replicated.h"
#include "../comm/requires_grad.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

struct SavedContext : torch::CustomClassHolder {
  Context context;

  explicit SavedContext(const Context& context) : context(context) {}
};

const Context& saved(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<SavedContext>(ctx->saved_data["call"].toCapsule())->context;
}

// (B, L, D) as pack wants it, with batch and rows at dims 0 and 2.
Tensor four_d(const Tensor& x) {
  return x.unsqueeze(1);
}

// This rank's tokens of (B, L, D).
Tensor my_tokens(const Tensor& x, const Context& context) {
  return shard(four_d(x), context).squeeze(1);
}

// This rank's parts (.., rows, ..) of several tensors -> the whole ones of `sizes`. seal: what the ranks compare.
std::vector<Tensor> gather_tokens(const std::vector<Tensor>& parts, std::vector<c10::SymInt> sizes,
                                  const Context& context, const std::optional<Seal>& seal = std::nullopt) {
  std::vector<Tensor> flat;
  for (const Tensor& part : parts) flat.push_back(part.reshape(-1));
  if (seal) flat.push_back(digits_of(*seal, parts[0]));
  const bool copied = flat.size() > 1;
  Tensor mine =
      sum_over(copied ? at::cat(flat) : flat[0], {context.groups.head, {}}, context.reduce_dtype, copied);
  Tensor buffer = run(Collective::all_gather, mine.unsqueeze(0), context.groups.slice);
  std::vector<int64_t> dims(parts.size(), context.sharded_dim());
  if (!seal) return unpack(buffer, sizes, dims, context.sizes.m, context.zigzag());
  sizes.insert(sizes.end(), {1, 1, 1, flat.back().size(0)});
  dims.push_back(-1);  // summed over the ranks
  auto whole = unpack(buffer, sizes, dims, context.sizes.m, context.zigzag());
  whole[0] = opened(whole[0], whole.back(), *seal);
  whole.pop_back();
  return whole;
}

struct EnterSharded : torch::autograd::Function<EnterSharded> {
  static variable_list forward(AutogradContext* ctx, at::TensorList xs,
                               const c10::intrusive_ptr<SavedContext>& call) {
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    std::vector<c10::SymInt> sizes;
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list out;
    for (const Tensor& x : xs) {
      Tensor whole = four_d(x);
      sizes.insert(sizes.end(), whole.sym_sizes().begin(), whole.sym_sizes().end());
      out.push_back(my_tokens(x, call->context).clone());
    }
    ctx->saved_data["sizes"] = sizes;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    std::vector<Tensor> parts;
    for (const Tensor& grad : grads) parts.push_back(four_d(grad));
    variable_list out = gather_tokens(parts, ctx->saved_data["sizes"].toSymIntVector(), saved(ctx));
    for (Tensor& grad : out) grad = grad.squeeze(1);
    out.emplace_back();
    return out;
  }
};

struct ReduceSharded : torch::autograd::Function<ReduceSharded> {
  static Tensor forward(AutogradContext* ctx, const Tensor& y, const c10::intrusive_ptr<SavedContext>& call) {
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto& s = call->context.sizes;
    return gather_tokens({y}, {s.B, 1, s.L, y.sym_size(2)}, call->context, call->context.seal)[0].squeeze(1);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once_differentiable(grads[0]);
    return {my_tokens(grads[0], saved(ctx)).clone(), Tensor()};
  }
};

}  // namespace

std::vector<Tensor> enter_sharded(const std::vector<Tensor>& xs, const Context& context) {
  std::vector<Tensor> out = xs;
  for (Tensor& x : out)
    if (!x.requires_grad() || !at::GradMode::is_enabled()) x = my_tokens(x, context);
  return where_requires_grad(out, [&](at::TensorList trained) {
    return EnterSharded::apply(trained, c10::make_intrusive<SavedContext>(context));
  });
}

Tensor reduce_sharded(const Tensor& y, const Context& context) {
  return ReduceSharded::apply(y, c10::make_intrusive<SavedContext>(context));
}

}  // namespace two_level_mha
