#include "dealt.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../move/pack.h"
#include "trained.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

struct Saved : torch::CustomClassHolder {
  Layout layout;
  Place place;

  Saved(const Layout& layout, const Place& place) : layout(layout), place(place) {}
};

c10::intrusive_ptr<Saved> saved(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Saved>(ctx->saved_data["call"].toCapsule());
}

// (B, L, D) as pack wants it, with batch and rows at dims 0 and 2.
Tensor four_d(const Tensor& x) {
  return x.unsqueeze(1);
}

// The layout of a tensor whose rows are `x`'s, not the queries' (keys and values of cross attention).
Layout layout_for(const Tensor& x, Layout layout) {
  layout.shape.length = x.sym_size(1);
  return layout;
}

// This rank's tokens of (B, L, D).
Tensor my_tokens(const Tensor& x, const Layout& layout) {
  return deal(four_d(x), layout_for(x, layout)).squeeze(1);
}

// This rank's parts (.., rows, ..) of several tensors -> the whole ones of `sizes`.
std::vector<Tensor> whole_again(const std::vector<Tensor>& parts, const std::vector<c10::SymInt>& sizes,
                                const Layout& layout, const Place& place) {
  std::vector<Tensor> flat;
  for (const Tensor& part : parts) flat.push_back(part.reshape(-1));
  Tensor mine = flat.size() == 1 ? flat[0] : at::cat(flat);
  if (place.groups.head.size > 1) {
    Tensor wide = place.reduce_dtype ? mine.to(*place.reduce_dtype) : mine;
    mine = sum_in_group(wide, place.groups.head).to(mine.scalar_type());
  }
  Tensor buffer = run(Collective::all_gather, mine.unsqueeze(0), place.groups.slice);
  std::vector<int64_t> dims(parts.size(), layout.dealt_dim());
  return unpack(buffer, sizes, dims, layout.m, layout.zigzag);
}

struct EnterDealt : torch::autograd::Function<EnterDealt> {
  static variable_list forward(AutogradContext* ctx, at::TensorList xs,
                               const c10::intrusive_ptr<Saved>& call) {
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    std::vector<c10::SymInt> sizes;
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list out;
    for (const Tensor& x : xs) {
      Tensor whole = four_d(x);
      sizes.insert(sizes.end(), whole.sym_sizes().begin(), whole.sym_sizes().end());
      out.push_back(my_tokens(x, call->layout).clone());
    }
    ctx->saved_data["sizes"] = sizes;
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto call = saved(ctx);
    std::vector<Tensor> parts;
    for (const Tensor& grad : grads) parts.push_back(four_d(grad));
    variable_list out =
        whole_again(parts, ctx->saved_data["sizes"].toSymIntVector(), call->layout, call->place);
    for (Tensor& grad : out) grad = grad.squeeze(1);
    out.emplace_back();
    return out;
  }
};

struct ReduceDealt : torch::autograd::Function<ReduceDealt> {
  static Tensor forward(AutogradContext* ctx, const Tensor& y, const c10::intrusive_ptr<Saved>& call) {
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto& shape = call->layout.shape;
    return whole_again({y}, {shape.batch, 1, shape.length, y.sym_size(2)}, call->layout, call->place)[0]
        .squeeze(1);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once_differentiable(grads[0]);
    return {my_tokens(grads[0], saved(ctx)->layout).clone(), Tensor()};
  }
};

}  // namespace

std::vector<Tensor> enter_dealt(const std::vector<Tensor>& xs, const Layout& layout, const Place& place) {
  std::vector<Tensor> out = xs;
  for (Tensor& x : out)
    if (!x.requires_grad() || !at::GradMode::is_enabled()) x = my_tokens(x, layout);
  return where_trained(out, [&](at::TensorList trained) {
    return EnterDealt::apply(trained, c10::make_intrusive<Saved>(layout, place));
  });
}

Tensor reduce_dealt(const Tensor& y, const Layout& layout, const Place& place) {
  return ReduceDealt::apply(y, c10::make_intrusive<Saved>(layout, place));
}

}  // namespace two_level_mha
