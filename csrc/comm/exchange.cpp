#include "exchange.h"

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "progress.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Boxed: torch 2.15 types the group as Any, 2.11 as str, and a typed call fits only one of them.
Tensor call(const char* name, std::vector<c10::IValue> args) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  torch::jit::Stack stack(std::make_move_iterator(args.begin()), std::make_move_iterator(args.end()));
  op.callBoxed(stack);
  return stack[0].toTensor();
}

Tensor wait_tensor(const Tensor& x) {
  return call("_c10d_functional::wait_tensor", {x});
}

Collective adjoint(Collective kind) {
  switch (kind) {
    case Collective::all_gather:
      return Collective::reduce_scatter;
    case Collective::reduce_scatter:
      return Collective::all_gather;
    default:
      return Collective::all_to_all;
  }
}

// Nothing to send: every rank knows it alike, and not every backend takes an empty tensor.
bool empty(const Tensor& x) {
  return x.sym_numel().maybe_as_int() == 0;
}

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::all_gather:
      return "all_gather";
    case Collective::reduce_scatter:
      return "reduce_scatter";
    default:
      return "all_to_all";
  }
}

Tensor in_group(const Tensor& x, const Group& group, const char* kind,
                const std::function<Tensor()>& exchange) {
  if (at::isTensorSubclassLike(x)) return exchange();  // traced: nothing is sent
  Tensor result;
  in_exchange(group, kind, [&] { result = exchange(); });
  return result;
}

Tensor issue(Collective kind, const Tensor& buffer, const Group& group) {
  once_differentiable(buffer);
  Tensor x = buffer.contiguous();
  if (empty(x)) {
    auto sizes = x.sym_sizes().vec();
    if (kind == Collective::all_gather) sizes[0] = group.size;
    return x.expand_symint(sizes).clone();
  }
  return in_group(x, group, name_of(kind), [&] {
    if (kind == Collective::all_gather)
      return call("_c10d_functional::all_gather_into_tensor", {x, group.size, group.name});
    if (kind == Collective::reduce_scatter && !x.is_cpu())
      return call("_c10d_functional::reduce_scatter_tensor", {x, std::string("sum"), group.size, group.name});
    std::vector<int64_t> ones(group.size, 1);
    return call("_c10d_functional::all_to_all_single", {x, ones, ones, group.name});
  });
}

Tensor finish(Collective kind, const Tensor& started, const Group& group) {
  Tensor x = empty(started) ? started.clone()
                            : in_group(started, group, name_of(kind), [&] { return wait_tensor(started); });
  const bool summed_here = x.is_cpu() || empty(x);
  return kind == Collective::reduce_scatter && summed_here ? x.sum(0, /*keepdim=*/true) : x;
}

c10::intrusive_ptr<Flight> flight(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Flight>(ctx->saved_data["flight"].toCapsule());
}

// A plain pair of functions dies in backward, where the gradient of the
// started tensor has the waited tensor's shape. Here Wait.backward issues
// the adjoint into the shared flight and Start.backward waits for it there.
struct Start : torch::autograd::Function<Start> {
  static Tensor forward(AutogradContext* ctx, const Tensor& buffer, int64_t kind,
                        const c10::intrusive_ptr<Flight>& shared) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["flight"] = c10::IValue::make_capsule(shared);
    ctx->saved_data["kind"] = kind;
    at::AutoDispatchBelowADInplaceOrView guard;
    return issue(Collective(kind), buffer, shared->group);
  }
  static variable_list backward(AutogradContext* ctx, variable_list) {
    auto shared = flight(ctx);
    variable_list grads(3);
    if (shared->gradient.defined()) {
      Tensor started = std::move(shared->gradient);
      shared->gradient = Tensor();
      grads[0] = finish(adjoint(Collective(ctx->saved_data["kind"].toInt())), started, shared->group);
    }
    return grads;
  }
};

struct Wait : torch::autograd::Function<Wait> {
  static Tensor forward(AutogradContext* ctx, const Tensor& started, int64_t kind,
                        const c10::intrusive_ptr<Flight>& shared) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["flight"] = c10::IValue::make_capsule(shared);
    ctx->saved_data["kind"] = kind;
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor x = finish(Collective(kind), started, shared->group);
    // of an input that a function returns autograd makes a view, which must not be written to
    return x.is_same(started) ? x.view_as(x) : x;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto shared = flight(ctx);
    const Collective back = adjoint(Collective(ctx->saved_data["kind"].toInt()));
    if (grads[0].defined()) shared->gradient = issue(back, grads[0], shared->group);
    return variable_list(3);
  }
};

}  // namespace

Exchange start(Collective kind, const Tensor& buffer, const Group& group) {
  auto shared = c10::make_intrusive<Flight>(group);
  return {Start::apply(buffer, int64_t(kind), shared), kind, shared};
}

Tensor Exchange::wait() const {
  return Wait::apply(started, int64_t(kind), flight);
}

Tensor run(Collective kind, const Tensor& buffer, const Group& group) {
  return finish(kind, issue(kind, buffer, group), group);
}

void once_differentiable(const Tensor& gradient) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(gradient.defined() && gradient.requires_grad() && at::GradMode::is_enabled()),
                              "gradients of gradients (create_graph=True) are not available on a grid of "
                              "several ranks: take them of a layer without a mesh, with need_weights=True, "
                              "or of the layer of torch or transformers that it stands for");
}

Tensor exchange_rows(const Tensor& x, const std::vector<int64_t>& sent, const std::vector<int64_t>& received,
                     const Group& group) {
  return in_group(x, group, "all_to_all", [&] {
    return wait_tensor(
        call("_c10d_functional::all_to_all_single", {x.contiguous(), received, sent, group.name}));
  });
}

Tensor sum_in_group(const Tensor& x, const Group& group) {
  if (group.size == 1 || empty(x)) return x;
  once_differentiable(x);
  return in_group(x, group, "all_reduce", [&] {
    return wait_tensor(
        call("_c10d_functional::all_reduce", {x.contiguous(), std::string("sum"), group.name}));
  });
}

Tensor sum_in_group_(const Tensor& x, const Group& group) {
  if (at::isTensorSubclassLike(x)) return sum_in_group(x, group);  // graphs have no such form
  if (group.size == 1 || empty(x)) return x;
  return in_group(x, group, "all_reduce", [&] {
    return wait_tensor(call("_c10d_functional::all_reduce_", {x, std::string("sum"), group.name}));
  });
}

}  // namespace two_level_mha
