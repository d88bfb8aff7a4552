#include "exchange.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include "pairs.h"
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

bool in_graph() {
  return c10::impl::TorchDispatchModeTLS::get_mode(c10::impl::TorchDispatchModeKey::PROXY).has_value();
}

// (1, N) -> (g, N). Between nodes a ring sends less over their link than pairs do, but of two ranks. On the CPU not by
// the functional operator alone: in torch 2.15 two of them that Gloo runs at once write to freed memory, which its
// variant with `out` does not. A graph has no such variant: there it is waited for.
Tensor issue_all_gather(const Tensor& x, const Group& group) {
  if (group.size == 2 && has_pairs(x, group))
    return call("two_level_mha::_all_gather_pairs", {x, group.size, group.name, in_graph()});
  if (x.is_cpu() && !at::isTensorSubclassLike(x)) {
    auto sizes = x.sizes().vec();
    sizes[0] = group.size;
    return call("_c10d_functional::all_gather_into_tensor_out",
                {x, group.size, group.name, at::empty(sizes, x.options())});
  }
  Tensor started = call("_c10d_functional::all_gather_into_tensor", {x, group.size, group.name});
  return x.is_cpu() && in_graph() ? wait_tensor(started) : started;
}

Tensor issue_all_to_all(const Tensor& x, const std::vector<int64_t>& received,
                        const std::vector<int64_t>& sent, const Group& group) {
  if (has_pairs(x, group))
    return call("two_level_mha::_all_to_all_pairs", {x, received, sent, group.name, in_graph()});
  return call("_c10d_functional::all_to_all_single", {x, received, sent, group.name});
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
    if (kind == Collective::all_gather) return issue_all_gather(x, group);
    if (kind == Collective::reduce_scatter && !x.is_cpu())
      return call("_c10d_functional::reduce_scatter_tensor", {x, std::string("sum"), group.size, group.name});
    const std::vector<int64_t> ones(group.size, 1);
    return issue_all_to_all(x, ones, ones, group);
  });
}

Tensor finish(Collective kind, const Tensor& started, const Group& group) {
  Tensor x = empty(started) ? started.clone()
                            : in_group(started, group, name_of(kind), [&] { return wait_tensor(started); });
  const bool summed_here = x.is_cpu() || empty(x);
  return kind == Collective::reduce_scatter && summed_here ? x.sum(0, /*keepdim=*/true) : x;
}

// What the two halves of one exchange share, and what of it is on its way.
struct Transfer : torch::CustomClassHolder {
  Begin forward;
  BeginBack backward;
  Later<Tensor> coming;
  Later<std::vector<Tensor>> coming_back;

  Transfer(Begin forward, BeginBack backward) : forward(std::move(forward)), backward(std::move(backward)) {}
};

c10::intrusive_ptr<Transfer> transfer(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Transfer>(ctx->saved_data["transfer"].toCapsule());
}

// A plain pair of functions dies in backward, where the gradient of the started tensor has the waited tensor's shape.
// Here Wait.backward begins the adjoint, and Start.backward waits for it; between the two goes a tensor of no elements.
struct Start : torch::autograd::Function<Start> {
  static Tensor forward(AutogradContext* ctx, at::TensorList xs, const c10::intrusive_ptr<Transfer>& shared) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["transfer"] = c10::IValue::make_capsule(shared);
    ctx->saved_data["count"] = int64_t(xs.size());
    at::AutoDispatchBelowADInplaceOrView guard;
    shared->coming = shared->forward(xs.vec());
    return at::empty({0}, xs[0].options());
  }
  static variable_list backward(AutogradContext* ctx, variable_list) {
    auto shared = transfer(ctx);
    variable_list grads(ctx->saved_data["count"].toInt());
    if (shared->coming_back) grads = arrived(shared->coming_back);
    grads.emplace_back();
    return grads;
  }
};

struct Wait : torch::autograd::Function<Wait> {
  static Tensor forward(AutogradContext* ctx, const Tensor&, const c10::intrusive_ptr<Transfer>& shared) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["transfer"] = c10::IValue::make_capsule(shared);
    at::AutoDispatchBelowADInplaceOrView guard;
    return arrived(shared->coming);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto shared = transfer(ctx);
    once_differentiable(grads[0]);
    if (grads[0].defined()) shared->coming_back = shared->backward(grads[0]);
    return variable_list(2);
  }
};

}  // namespace

Later<Tensor> begin(const std::vector<Tensor>& xs, Begin forward, BeginBack backward) {
  auto shared = c10::make_intrusive<Transfer>(std::move(forward), std::move(backward));
  Tensor started = Start::apply(at::TensorList(xs), shared);
  return {[=] { return Wait::apply(started, shared); },
          [=] {
            at::AutoDispatchBelowADInplaceOrView guard;
            return shared->coming.advance();
          }};
}

Later<Tensor> start(Collective kind, const Tensor& buffer, const Group& group) {
  return begin(
      {buffer}, [=](const std::vector<Tensor>& xs) { return begin_run(kind, xs[0], group); },
      [=](const Tensor& gradient) -> Later<std::vector<Tensor>> {
        auto back = begin_run(adjoint(kind), gradient, group);
        return [=] { return std::vector<Tensor>{back()}; };
      });
}

Later<Tensor> begin_run(Collective kind, const Tensor& buffer, const Group& group) {
  Tensor started = issue(kind, buffer, group);
  return [=]() mutable {
    const Tensor mine = std::move(started);  // nobody else keeps it once it has come
    return finish(kind, mine, group);
  };
}

Tensor run(Collective kind, const Tensor& buffer, const Group& group) {
  return begin_run(kind, buffer, group)();
}

void once_differentiable(const Tensor& gradient) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(gradient.defined() && gradient.requires_grad() && at::GradMode::is_enabled()),
                              "gradients of gradients (create_graph=True) are not available on a grid of "
                              "several ranks: take them of a layer without a mesh, with need_weights=True, "
                              "or of the layer of torch or transformers that it stands for");
}

Tensor exchange_rows(const Tensor& x, const std::vector<int64_t>& sent, const std::vector<int64_t>& received,
                     const Group& group) {
  return in_group(x, group, "all_to_all",
                  [&] { return wait_tensor(issue_all_to_all(x.contiguous(), received, sent, group)); });
}

Later<Tensor> begin_sum_in_group(const Tensor& x, const Group& group, bool own) {
  if (group.size == 1 || empty(x)) return [=] { return own ? x : x.clone(); };
  once_differentiable(x);
  // graphs have no form that writes to x
  const bool in_place = own && x.is_contiguous() && !at::isTensorSubclassLike(x);
  const char* name = in_place ? "_c10d_functional::all_reduce_" : "_c10d_functional::all_reduce";
  Tensor started = in_group(x, group, "all_reduce", [&] {
    return call(name, {x.contiguous(), std::string("sum"), group.name});
  });
  return [=] { return in_group(started, group, "all_reduce", [&] { return wait_tensor(started); }); };
}

Tensor sum_in_group(const Tensor& x, const Group& group) {
  return begin_sum_in_group(x, group, /*own=*/false)();
}

}  // namespace two_level_mha
