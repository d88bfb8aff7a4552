// The op: checks, shapes for tracing, autograd, autocast. kernels.h says which kernel serves a call.
#include "partial_attention.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "contract.h"
#include "registry.h"
#include "rows.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// The op's functions take Attend first. `Schema` spreads it into the arguments in the order of the schema,
// which for the op and for its backward follow the tensors.
template <auto kFunction>
struct Schema;

template <class Result, class... Rest, Result (*kFunction)(const Attend&, Rest...)>
struct Schema<kFunction> {
  static Result call(Rest... rest, const std::optional<Tensor>& mask, std::optional<double> scale,
                     std::optional<c10::SymInt> causal, std::optional<c10::SymInt> window, double softcap,
                     double dropout_p, const std::optional<Tensor>& seed, c10::SymIntArrayRef origin,
                     c10::SymInt key_stride, std::string_view kernel) {
    TORCH_CHECK_VALUE(origin.size() == 3, "origin must be (batch, head, row), got ", origin.size(),
                      " numbers");
    return kFunction({mask,
                      scale,
                      std::move(causal),
                      std::move(window),
                      softcap,
                      dropout_p,
                      seed,
                      {origin[0], origin[1], origin[2]},
                      std::move(key_stride),
                      std::string(kernel)},
                     rest...);
  }
};

// The other way: calls an op with `rest` and then the arguments in `a`.
template <class Op, class... Rest>
auto call_op(const Op& op, const Attend& a, const Rest&... rest) {
  return op.call(rest..., a.mask, a.scale, a.causal, a.window, a.softcap, a.dropout_p, a.seed, a.origin,
                 a.key_stride, a.kernel);
}

bool one_of_four(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

}  // namespace

void check_mask_dtype(const Tensor& mask) {
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool || one_of_four(mask.scalar_type()),
                    "attn_mask must be bool, float64, float32, bfloat16 or float16, got ",
                    mask.scalar_type());
}

void check_attention(const Attend& a, const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                    "q, k and v must be 4-D (B, heads, length, dim), got ", q.dim(), "-D, ", k.dim(),
                    "-D and ", v.dim(), "-D");
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "q, k and v must have one dtype, got ", q.scalar_type(), ", ", k.scalar_type(), " and ",
                    v.scalar_type());
  TORCH_CHECK_VALUE(one_of_four(q.scalar_type()),
                    "q, k and v must be float64, float32, bfloat16 or float16, got ", q.scalar_type());
  TORCH_CHECK_VALUE(q.device() == k.device() && q.device() == v.device(),
                    "q, k and v must be on one device, got ", q.device(), ", ", k.device(), " and ",
                    v.device());
  TORCH_CHECK_VALUE(q.sym_size(0) == k.sym_size(0) && q.sym_size(0) == v.sym_size(0),
                    "q, k and v must have one batch size, got ", q.sym_size(0), ", ", k.sym_size(0), " and ",
                    v.sym_size(0));
  TORCH_CHECK_VALUE(k.sym_size(2) == v.sym_size(2), "k and v must have one length, got ", k.sym_size(2),
                    " and ", v.sym_size(2));
  TORCH_CHECK_VALUE(q.sym_size(3) == k.sym_size(3), "q and k must have one head dim, got ", q.sym_size(3),
                    " and ", k.sym_size(3));
  TORCH_CHECK_VALUE(k.sym_size(1) == v.sym_size(1) && k.sym_size(1) > 0 && q.sym_size(1) % k.sym_size(1) == 0,
                    "the heads of k and v must be equal and divide those of q, got ", q.sym_size(1),
                    " query heads, ", k.sym_size(1), " key heads and ", v.sym_size(1), " value heads");
  TORCH_CHECK_VALUE(a.dropout_p >= 0.0 && a.dropout_p <= 1.0, "dropout_p must be in [0, 1], got ",
                    a.dropout_p);
  TORCH_CHECK_VALUE(a.softcap >= 0.0, "softcap must be positive, or 0 for none, got ", a.softcap);
  TORCH_CHECK_VALUE(
      a.dropout_p == 0.0 || (a.seed && a.seed->numel() == 1 && a.seed->scalar_type() == at::kLong &&
                             a.seed->device() == q.device()),
      "dropout_p > 0 needs seed, an int64 tensor of one element on ", q.device());
  TORCH_CHECK_VALUE(!a.window || a.causal, "window needs causal");
  TORCH_CHECK_VALUE(a.key_stride >= 1 && a.key_stride <= int64_t(1) << 31,
                    "key_stride must be at least 1 and at most 2**31, got ", a.key_stride);
  TORCH_CHECK_VALUE(a.dropout_p == 0.0 || a.key_stride == 1,
                    "dropout_p must be 0 where key_stride is not 1, got dropout_p ", a.dropout_p,
                    " and key_stride ", a.key_stride, ": dropout is drawn by the index of a key");
  check_kernel_name(a.kernel);
  if (!a.mask) return;
  const Tensor& mask = *a.mask;
  check_mask_dtype(mask);
  TORCH_CHECK_VALUE(mask.device() == q.device(), "attn_mask must be on ", q.device(), ", got ",
                    mask.device());
  TORCH_CHECK_VALUE(mask.dim() <= 4, "attn_mask must be broadcastable to (B, H, L, S), got ", mask.dim(),
                    "-D");
  const std::array<c10::SymInt, 4> full{q.sym_size(0), q.sym_size(1), q.sym_size(2), k.sym_size(2)};
  for (int64_t dim = 0; dim < mask.dim(); ++dim) {
    const auto size = mask.sym_size(dim), want = full[4 - mask.dim() + dim];
    TORCH_CHECK_VALUE(size == 1 || size == want, "attn_mask must be broadcastable to (B, H, L, S) = (",
                      full[0], ", ", full[1], ", ", full[2], ", ", full[3], "), got ", mask.sym_sizes());
  }
}

Attend in_range(Attend a) {
  constexpr int64_t kFar = int64_t(1) << 60;  // beyond every key; positions computed from it do not overflow
  auto clamp = [](std::optional<c10::SymInt>& x, int64_t most) {
    if (const auto known = x ? x->maybe_as_int() : std::nullopt) x = std::clamp(*known, -most, most);
  };
  clamp(a.causal, kFar);
  clamp(a.window, 2 * kFar);
  // What is below changes no score by more than this, and as a float would be 0, which is no cap.
  if (a.softcap > 0.0) a.softcap = std::max(a.softcap, 1e-20);
  return a;
}

namespace {

Tensor four_d(Tensor mask) {
  while (mask.dim() < 4) mask = mask.unsqueeze(0);
  return mask;
}

AttentionParams concrete(const Attend& asked, const Tensor& q) {
  const Attend a = in_range(asked);
  AttentionParams params;
  params.scale = a.scale.value_or(1.0 / std::sqrt(double(q.size(3))));
  if (a.causal) params.causal = a.causal->expect_int();
  if (a.window) params.window = a.window->expect_int();
  params.softcap = a.softcap;
  params.dropout_p = a.dropout_p;
  if (a.mask) params.mask = four_d(*a.mask);
  if (a.seed) params.seed = *a.seed;
  for (size_t i = 0; i < 3; ++i) params.origin[i] = a.origin[i].expect_int();
  params.key_stride = a.key_stride.expect_int();
  return params;
}

std::tuple<Tensor, Tensor> forward_kernel(const Attend& a, const Tensor& q, const Tensor& k,
                                          const Tensor& v) {
  check_attention(a, q, k, v);
  return attention_forward(a.kernel, q, k, v, concrete(a, q));
}

// What forward gave for these inputs, and the gradients of it.
void check_results(const Tensor& q, const Tensor& v, const Tensor& grad_out,
                   const std::optional<Tensor>& grad_logsumexp, const Tensor& out, const Tensor& logsumexp) {
  const std::array<int64_t, 4> rows{q.size(0), q.size(1), q.size(2), v.size(3)};
  const at::IntArrayRef row_sizes(rows), sums(rows.data(), 3);
  TORCH_CHECK_VALUE(out.sizes() == row_sizes && grad_out.sizes() == row_sizes,
                    "out and grad_out must have shape ", row_sizes, ", got ", out.sizes(), " and ",
                    grad_out.sizes());
  TORCH_CHECK_VALUE(logsumexp.sizes() == sums && (!grad_logsumexp || grad_logsumexp->sizes() == sums),
                    "logsumexp and its gradient must have shape ", sums, ", got ", logsumexp.sizes());
}

void check_backward(const Attend& a, const Tensor& grad_out, const std::optional<Tensor>& grad_logsumexp,
                    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                    const Tensor& logsumexp, bool mask_grad) {
  check_attention(a, q, k, v);
  for (const Tensor& x : {out, grad_out, logsumexp, grad_logsumexp.value_or(logsumexp)})
    TORCH_CHECK_VALUE(x.device() == q.device(), "out, logsumexp and gradients must be on ", q.device(),
                      ", got ", x.device());
  TORCH_CHECK_VALUE(!mask_grad || a.mask, "mask_grad needs attn_mask");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_kernel(const Attend& a, const Tensor& grad_out,
                                                           const std::optional<Tensor>& grad_logsumexp,
                                                           const Tensor& q, const Tensor& k, const Tensor& v,
                                                           const Tensor& out, const Tensor& logsumexp,
                                                           bool mask_grad) {
  // The forward's products are not autocast either: a large bias has no room in half precision.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_backward(a, grad_out, grad_logsumexp, q, k, v, out, logsumexp, mask_grad);
  check_results(q, v, grad_out, grad_logsumexp, out, logsumexp);
  AttentionParams params = concrete(a, q);
  params.mask_grad = mask_grad;
  Backward grads = attention_backward(a.kernel, grad_out, grad_logsumexp.value_or(Tensor()), q, k, v, out,
                                      logsumexp, params);
  Tensor& dmask = std::get<3>(grads);
  dmask = dmask.defined() ? dmask.view(a.mask->sizes()) : at::empty({0}, q.options());
  return grads;
}

std::tuple<Tensor, Tensor> forward_meta(const Attend& a, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_attention(a, q, k, v);
  auto B = q.sym_size(0), H = q.sym_size(1), L = q.sym_size(2);
  auto wide = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {empty_rows(q, B, H, L, v.sym_size(3)), at::empty_symint({B, H, L}, wide)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_meta(const Attend& a, const Tensor& grad_out,
                                                         const std::optional<Tensor>& grad_logsumexp,
                                                         const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const Tensor& out, const Tensor& logsumexp,
                                                         bool mask_grad) {
  check_backward(a, grad_out, grad_logsumexp, q, k, v, out, logsumexp, mask_grad);
  auto rows = [](const Tensor& x) {
    return empty_rows(x, x.sym_size(0), x.sym_size(1), x.sym_size(2), x.sym_size(3));
  };
  return {rows(q), rows(k), rows(v),
          mask_grad ? at::empty_symint(a.mask->sym_sizes(), a.mask->options()) : at::empty({0}, q.options())};
}

const auto& forward_op() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("two_level_mha::partial_attention", "")
                       .typed<decltype(Schema<forward_kernel>::call)>();
  return op;
}

const auto& backward_op() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("two_level_mha::partial_attention_backward", "")
                       .typed<decltype(Schema<backward_kernel>::call)>();
  return op;
}

std::optional<Tensor> maybe(const Tensor& x) {
  return x.defined() ? std::optional<Tensor>(x) : std::nullopt;
}

// What is left in Attend once its tensors are saved with the others, and back.
void save(const Attend& a, ska::flat_hash_map<std::string, at::IValue>& data) {
  data["scale"] = a.scale;
  data["causal"] = a.causal;
  data["window"] = a.window;
  data["softcap"] = a.softcap;
  data["dropout_p"] = a.dropout_p;
  data["origin"] = std::vector<c10::SymInt>(a.origin.begin(), a.origin.end());
  data["key_stride"] = a.key_stride;
  data["kernel"] = has_backward(a.kernel) ? a.kernel : "";
}

Attend saved(ska::flat_hash_map<std::string, at::IValue>& data, const Tensor& mask, const Tensor& seed) {
  auto symbol = [&](const char* name) {
    return data[name].isNone() ? std::nullopt : std::optional<c10::SymInt>(data[name].toSymInt());
  };
  const auto origin = data["origin"].toSymIntVector();
  return {maybe(mask),
          data["scale"].toOptional<double>(),
          symbol("causal"),
          symbol("window"),
          data["softcap"].toDouble(),
          data["dropout_p"].toDouble(),
          maybe(seed),
          {origin[0], origin[1], origin[2]},
          data["key_stride"].toSymInt(),
          data["kernel"].toStringRef()};
}

struct PartialAttention : torch::autograd::Function<PartialAttention> {
  // The mask is in `a` as well: here it stands for itself, so that it can have a gradient.
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& mask, const Attend& a) {
    ctx->set_materialize_grads(false);
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, logsumexp] = call_op(forward_op(), a, q, k, v);
    ctx->save_for_backward({q, k, v, out, logsumexp, mask.value_or(Tensor()), a.seed.value_or(Tensor())});
    save(a, ctx->saved_data);
    ctx->saved_data["mask_grad"] = mask && mask->requires_grad();
    return {out, logsumexp};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    auto x = ctx->get_saved_variables();
    const bool mask_grad = ctx->saved_data["mask_grad"].toBool();
    auto [dq, dk, dv, dmask] = call_op(backward_op(), saved(ctx->saved_data, x[5], x[6]),
                                       grads[0].defined() ? grads[0] : at::zeros_like(x[3]), maybe(grads[1]),
                                       x[0], x[1], x[2], x[3], x[4], mask_grad);
    result[0] = dq, result[1] = dk, result[2] = dv;
    if (mask_grad) result[3] = dmask;
    return result;
  }
};

std::tuple<Tensor, Tensor> forward_autograd(const Attend& a, const Tensor& q, const Tensor& k,
                                            const Tensor& v) {
  auto out = PartialAttention::apply(q, k, v, a.mask, a);
  return {out[0], out[1]};
}

// No derivative: its backward only says so, where there would be one.
struct PartialAttentionBackward : torch::autograd::Function<PartialAttentionBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad_out,
                               const std::optional<Tensor>& grad_logsumexp, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                               const std::optional<Tensor>& mask, const Attend& a, bool mask_grad) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dv, dmask] =
        call_op(backward_op(), a, grad_out, grad_logsumexp, q, k, v, out, logsumexp, mask_grad);
    return {dq, dk, dv, dmask};
  }

  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "gradients of gradients (create_graph=True) are not available of fused "
                                "attention: take them of a layer without a mesh, with need_weights=True, or "
                                "of the layer of torch or transformers that it stands for");
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_autograd(const Attend& a, const Tensor& grad_out,
                                                             const std::optional<Tensor>& grad_logsumexp,
                                                             const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& out,
                                                             const Tensor& logsumexp, bool mask_grad) {
  auto grads = PartialAttentionBackward::apply(grad_out, grad_logsumexp, q, k, v, out, logsumexp, a.mask, a,
                                               mask_grad);
  return {grads[0], grads[1], grads[2], grads[3]};
}

template <c10::DispatchKey kKey, at::DeviceType kDevice>
std::tuple<Tensor, Tensor> forward_autocast(const Attend& a, const Tensor& q, const Tensor& k,
                                            const Tensor& v) {
  c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  auto dtype = at::autocast::get_autocast_dtype(kDevice);
  auto cast = [&](const Tensor& x) { return at::autocast::cached_cast(dtype, x, kDevice); };
  return call_op(forward_op(), a, cast(q), cast(k), cast(v));
}

}  // namespace

std::tuple<Tensor, Tensor> partial_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Attend& options) {
  return call_op(forward_op(), options, q, k, v);
}

TORCH_LIBRARY_IMPL(two_level_mha, CPU, library) {
  library.impl("partial_attention", Schema<forward_kernel>::call);
  library.impl("partial_attention_backward", Schema<backward_kernel>::call);
}

TORCH_LIBRARY_IMPL(two_level_mha, CUDA, library) {
  library.impl("partial_attention", Schema<forward_kernel>::call);
  library.impl("partial_attention_backward", Schema<backward_kernel>::call);
}

TORCH_LIBRARY_IMPL(two_level_mha, Meta, library) {
  library.impl("partial_attention", Schema<forward_meta>::call);
  library.impl("partial_attention_backward", Schema<backward_meta>::call);
}

TORCH_LIBRARY_IMPL(two_level_mha, Autograd, library) {
  library.impl("partial_attention", Schema<forward_autograd>::call);
  library.impl("partial_attention_backward", Schema<backward_autograd>::call);
}

TORCH_LIBRARY_IMPL(two_level_mha, AutocastCPU, library) {
  library.impl("partial_attention", Schema<forward_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>>::call);
}

TORCH_LIBRARY_IMPL(two_level_mha, AutocastCUDA, library) {
  library.impl("partial_attention",
               Schema<forward_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>>::call);
}

}  // namespace two_level_mha
