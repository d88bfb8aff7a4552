// ATen's flash, cuDNN and memory-efficient kernels behind one contract: logsumexp (B, H, L) float32, natural
// log, -inf for a row that sees no key (each of them has its own shape and its own value there).
#include "cuda.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isneginf.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "../../base/arithmetic.h"
#include "../hide.h"
#include "../rows.h"
#include "corner.h"

namespace two_level_mha {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t round_up(int64_t n, int64_t to) {
  return ceil_div(n, to) * to;
}

// A stripe of a call as all three kernels take it (corner.h; flash: always, efficient: mask type 2).
struct Call : Corner {
  const AttentionParams params;
  Tensor q, k, v;
  int64_t B, H, K, L, S;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const AttentionParams& p)
      : Corner(p, q_.size(2), k_.size(2)),
        params(p),
        q(q_),
        k(k_.narrow(2, first_key, keys)),
        v(v_.narrow(2, first_key, keys)),
        B(q_.size(0)),
        H(q_.size(1)),
        K(k_.size(1)),
        L(q_.size(2)),
        S(k_.size(2)) {}
  int64_t d_qk() const { return q.size(3); }
  int64_t d_v() const { return v.size(3); }
};

// 16-byte aligned base and strides, as all three kernels want them; a dim that is expanded has none.
Tensor aligned(const Tensor& x) {
  bool fits = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(3) == 1;
  for (int64_t dim = 0; dim < 3; dim++)
    fits = fits && x.stride(dim) * x.element_size() % 16 == 0 && (x.stride(dim) != 0 || x.size(dim) <= 1);
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);
}

Tensor widen(const Tensor& x, int64_t d) {
  return aligned(x.size(3) == d ? x : at::constant_pad_nd(x, {0, d - x.size(3)}));
}

Tensor cut_rows(const Tensor& x, int64_t d) {
  return as_rows(x.narrow(3, 0, d));
}

Backward as_gradients(const Call& call, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const int64_t after = call.S - call.first_key - call.keys;
  auto of_keys = [&](const Tensor& x, int64_t d) {
    return cut_rows(call.keys == call.S ? x : at::constant_pad_nd(x, {0, 0, call.first_key, after}), d);
  };
  return {cut_rows(dq, call.d_qk()), of_keys(dk, call.d_qk()), of_keys(dv, call.d_v()), Tensor()};
}

// --- flash and cuDNN: d_v = d_qk, so the narrower is padded with zeros, which change no score and no kept
// column.

int64_t common_width(const Call& call) {
  return round_up(std::max(call.d_qk(), call.d_v()), 8);
}

// What flash calls the left of a window: how many keys before its own a row sees; the right is none then.
std::optional<int64_t> left_of(const Call& call) {
  return call.window ? std::optional<int64_t>(*call.window - 1) : std::nullopt;
}

std::optional<int64_t> right_of(const Call& call) {
  return call.window ? std::optional<int64_t>(0) : std::nullopt;
}

Forward flash(const Call& call) {
  int64_t d = common_width(call);
  auto rows = [&](const Tensor& x) { return widen(x, d).transpose(1, 2); };
  auto result = at::_flash_attention_forward(rows(call.q), rows(call.k), rows(call.v), std::nullopt,
                                             std::nullopt, call.L, call.keys, 0.0, call.causal, false,
                                             call.params.scale, left_of(call), right_of(call));
  return {cut_rows(std::get<0>(result).transpose(1, 2), call.d_v()), std::get<1>(result)};
}

Forward cudnn(const Call& call) {
  int64_t d = common_width(call);
  auto result =
      at::_scaled_dot_product_cudnn_attention(widen(call.q, d), widen(call.k, d), widen(call.v, d),
                                              std::nullopt, true, 0.0, call.causal, false, call.params.scale);
  return {cut_rows(std::get<0>(result), call.d_v()),
          std::get<1>(result).reshape({call.B, call.H, call.L}).contiguous()};
}

// Takes its statistics as forward gives them, (B, H, L, 1), and wants them contiguous.
Backward cudnn_gradients(const Call& call, const Tensor& grad_out, const Tensor&, const Tensor& out,
                         const Tensor& logsumexp) {
  int64_t d = common_width(call);
  Tensor random = at::empty({}, call.q.options().dtype(at::kLong));  // not read without dropout
  auto [dq, dk, dv] = at::_scaled_dot_product_cudnn_attention_backward(
      widen(grad_out, d), widen(call.q, d), widen(call.k, d), widen(call.v, d), widen(out, d),
      logsumexp.contiguous().unsqueeze(-1), random, random, Tensor(), Tensor(), Tensor(), call.L, call.keys,
      0.0, call.causal, call.params.scale);
  return as_gradients(call, dq, dk, dv);
}

Backward flash_gradients(const Call& call, const Tensor& grad_out, const Tensor&, const Tensor& out,
                         const Tensor& logsumexp) {
  int64_t d = common_width(call);
  Tensor random = at::empty({2}, call.q.options().dtype(at::kLong));  // not read without dropout
  auto rows = [&](const Tensor& x) { return widen(x, d).transpose(1, 2); };
  auto [dq, dk, dv] = at::_flash_attention_backward(rows(grad_out), rows(call.q), rows(call.k), rows(call.v),
                                                    rows(out), logsumexp.contiguous(), Tensor(), Tensor(),
                                                    call.L, call.keys, 0.0, call.causal, random, random,
                                                    call.params.scale, left_of(call), right_of(call));
  return as_gradients(call, dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2));
}

// --- memory-efficient: any width, a mask, float32. Wants one KV head per query head: the heads of a group
// become rows of one head, where all its rows see the same; else keys and values are repeated.

int64_t alignment(const Call& call) {
  return 16 / call.q.element_size();
}

bool folds(const Call& call) {
  const Tensor& mask = call.params.mask;
  const bool same = !mask.defined() || (mask.size(1) == 1 && mask.size(2) == 1);
  return call.H != call.K && !call.causal && same;
}

// (B, H, L, D) -> (B, rows, heads, D), contiguous in D.
Tensor query_rows(const Call& call, const Tensor& x, int64_t d) {
  Tensor wide = widen(x, d);
  if (folds(call)) wide = wide.reshape({call.B, call.K, call.H / call.K * call.L, d});
  return wide.transpose(1, 2);
}

Tensor key_rows(const Call& call, const Tensor& x, int64_t d) {
  Tensor wide = widen(x, d);
  if (call.H != call.K && !folds(call)) wide = wide.repeat_interleave(call.H / call.K, 1);
  return wide.transpose(1, 2);
}

// The mask as a bias in q's dtype, (b, h, l, keys): what broadcasts takes no memory, rows are 16-byte
// aligned. Undefined without a mask.
Tensor bias_of(const Call& call) {
  const Tensor& whole = call.params.mask;
  if (!whole.defined()) return Tensor();
  Tensor mask =
      whole.size(3) == 1 ? whole.expand({-1, -1, -1, call.keys}) : whole.narrow(3, call.first_key, call.keys);
  auto sizes = mask.sizes().vec();
  sizes[3] = round_up(call.keys, 16);
  Tensor bias = at::zeros(sizes, call.q.options()).narrow(3, 0, call.keys);
  if (mask.scalar_type() == at::kBool) return bias.masked_fill_(mask.logical_not(), -kInfinity);
  return bias.copy_(mask);
}

// For q as query_rows has it.
std::optional<Tensor> for_kernel(const Call& call, const Tensor& bias, const Tensor& q) {
  if (!bias.defined()) return std::nullopt;
  return bias.expand({call.B, q.size(2), q.size(1), call.keys});
}

// (B, H, L), true for rows whose scores are all -inf to the kernel, since its logsumexp does not tell. It
// multiplies scores by log2(e) in float32, where the lowest numbers of float32 and bfloat16 overflow.
Tensor empty_rows_of(const Call& call, const Tensor& bias) {
  const bool overflows = call.q.scalar_type() != at::kHalf;
  Tensor visible = bias.le(overflows ? std::numeric_limits<float>::lowest() / 1.5 : -kInfinity).logical_not();
  if (!call.causal) return visible.any(-1).logical_not().expand({call.B, call.H, call.L});
  // How many of the keys up to any one can be seen: by a row, up to its last less those before its first.
  Tensor counts = visible.cumsum(-1, at::kInt).expand({-1, -1, call.L, -1});
  auto up_to = [&](const Tensor& key) {
    auto sizes = counts.sizes().vec();
    sizes[3] = 1;
    return counts.gather(3, key.unsqueeze(1).expand(sizes)).squeeze(3);
  };
  Tensor last = last_positions(visible, call.keys - call.L, 0, call.L), seen = up_to(last);
  if (call.window) {
    Tensor before = last - *call.window;
    seen = seen - at::where(before < 0, 0, up_to(before.clamp_min(0)));
  }
  return seen.eq(0).expand({call.B, call.H, call.L});
}

int64_t mask_type(const Call& call) {
  return call.causal ? 2 : 0;
}  // 2: causal from the bottom-right corner

Forward efficient(const Call& call) {
  int64_t d_qk = round_up(call.d_qk(), alignment(call)), d_v = round_up(call.d_v(), alignment(call));
  Tensor q = query_rows(call, call.q, d_qk), bias = bias_of(call);
  auto result = at::_efficient_attention_forward(q, key_rows(call, call.k, d_qk), key_rows(call, call.v, d_v),
                                                 for_kernel(call, bias, q), std::nullopt, std::nullopt,
                                                 std::nullopt, std::nullopt, 0.0, mask_type(call), true,
                                                 call.params.scale, std::nullopt, call.window);
  Tensor out = std::get<0>(result).transpose(1, 2).reshape({call.B, call.H, call.L, d_v});
  Tensor logsumexp =
      std::get<1>(result).narrow(2, 0, q.size(1)).reshape({call.B, call.H, call.L}).contiguous();
  out = cut_rows(out, call.d_v());
  if (bias.defined()) {
    Tensor empty = empty_rows_of(call, bias);
    out.masked_fill_(empty.unsqueeze(-1), 0);
    logsumexp.masked_fill_(empty, -kInfinity);
  }
  return {out, logsumexp};
}

// The kernel takes delta = sum(out * grad_out) over the columns by itself, where a gradient g of the
// logsumexp asks for delta - g. Two more columns do that: grad_out c, out -g / c (rounded, and what rounding
// lost), v 0. c keeps a g that a GradScaler made large in float16's range.
constexpr double kLift = 256;

Backward efficient_gradients(const Call& call, const Tensor& grad_out, const Tensor& grad_logsumexp,
                             const Tensor& out, const Tensor& logsumexp) {
  bool more = grad_logsumexp.defined();
  int64_t d_qk = round_up(call.d_qk(), alignment(call)),
          d_v = round_up(call.d_v() + 2 * more, alignment(call));
  Tensor grad_wide = widen(grad_out, d_v), out_wide = widen(out, d_v);
  if (more) {
    Tensor g = at::where(at::isneginf(logsumexp), 0.0, grad_logsumexp.to(at::kFloat)).div(-kLift);
    Tensor rounded = g.to(call.q.scalar_type());
    grad_wide.narrow(3, call.d_v(), 2).fill_(kLift);
    out_wide.select(3, call.d_v()).copy_(rounded);
    out_wide.select(3, call.d_v() + 1).copy_(g - rounded);
  }
  Tensor q = query_rows(call, call.q, d_qk), k = key_rows(call, call.k, d_qk),
         v = key_rows(call, call.v, d_v);
  int64_t rows = q.size(1), heads = q.size(2);
  Tensor lse = at::full({call.B, heads, round_up(rows, 32)}, kInfinity, logsumexp.options());
  lse.narrow(2, 0, rows)
      .copy_(at::where(at::isneginf(logsumexp), kInfinity, logsumexp).reshape({call.B, heads, rows}));
  Tensor random = at::empty({}, call.q.options().dtype(at::kLong));  // not read without dropout
  auto result = at::_efficient_attention_backward(
      query_rows(call, grad_wide, d_v).contiguous(), q, k, v, for_kernel(call, bias_of(call), q),
      query_rows(call, out_wide, d_v).contiguous(), std::nullopt, std::nullopt, rows, call.keys, lse, 0.0,
      random, random, mask_type(call), false, call.params.scale, std::nullopt, call.window);
  Tensor dq = std::get<0>(result).transpose(1, 2).reshape({call.B, call.H, call.L, d_qk});
  auto of_heads = [&](const Tensor& x) {
    Tensor heads_first = x.transpose(1, 2);
    return heads == call.K ? heads_first : heads_first.unflatten(1, {call.K, heads / call.K}).sum(2);
  };
  return as_gradients(call, dq, of_heads(std::get<1>(result)), of_heads(std::get<2>(result)));
}

// --- a call in stripes (corner.h)

// The stripe's rows of a tensor (.., .., L, ..), or an undefined one.
Tensor rows_of(const Stripe& stripe, const Tensor& x) {
  return x.defined() ? x.slice(2, stripe.first, stripe.first + stripe.rows * stripe.step, stripe.step) : x;
}

AttentionParams params_of(const Stripe& stripe, AttentionParams params) {
  static_cast<Visible&>(params) = stripe.visible;
  if (params.mask.defined() && params.mask.size(2) > 1) params.mask = rows_of(stripe, params.mask);
  return params;
}

template <auto kForward>
Forward in_stripes(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  const int64_t L = q.size(2);
  const auto stripes = stripes_of(params, L, k.size(2));
  if (stripes.size() == 1 && stripes[0].rows == L)
    return kForward(Call(q, k, v, params_of(stripes[0], params)));
  Tensor out = empty_rows(q, q.size(0), q.size(1), L, v.size(3)).zero_();
  Tensor logsumexp = at::full({q.size(0), q.size(1), L}, -kInfinity, q.options().dtype(at::kFloat));
  for (const Stripe& stripe : stripes) {
    const auto [part, sums] = kForward(Call(rows_of(stripe, q), k, v, params_of(stripe, params)));
    rows_of(stripe, out).copy_(part);
    rows_of(stripe, logsumexp).copy_(sums);
  }
  return {out, logsumexp};
}

template <auto kBackward>
Backward in_stripes(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q, const Tensor& k,
                    const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                    const AttentionParams& params) {
  const int64_t L = q.size(2);
  const auto stripes = stripes_of(params, L, k.size(2));
  if (stripes.size() == 1 && stripes[0].rows == L)
    return kBackward(Call(q, k, v, params_of(stripes[0], params)), grad_out, grad_logsumexp, out, logsumexp);
  Tensor dq = empty_rows(q, q.size(0), q.size(1), L, q.size(3)).zero_();
  // halves would lose bits in every sum
  Tensor dk = at::zeros(k.sizes(), k.options().dtype(at::kFloat));
  Tensor dv = at::zeros(v.sizes(), dk.options());
  for (const Stripe& stripe : stripes) {
    auto rows = [&](const Tensor& x) { return rows_of(stripe, x); };
    const auto [part_dq, part_dk, part_dv, _] =
        kBackward(Call(rows(q), k, v, params_of(stripe, params)), rows(grad_out), rows(grad_logsumexp),
                  rows(out), rows(logsumexp));
    rows(dq).copy_(part_dq);
    dk.add_(part_dk);
    dv.add_(part_dv);
  }
  return {dq, as_rows(dk.to(k.scalar_type())), as_rows(dv.to(v.scalar_type())), Tensor()};
}

}  // namespace

Forward cudnn_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  return in_stripes<cudnn>(q, k, v, params);
}

Backward cudnn_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                        const AttentionParams& params) {
  return in_stripes<cudnn_gradients>(grad_out, grad_logsumexp, q, k, v, out, logsumexp, params);
}

Forward flash_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  return in_stripes<flash>(q, k, v, params);
}

Backward flash_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                        const AttentionParams& params) {
  return in_stripes<flash_gradients>(grad_out, grad_logsumexp, q, k, v, out, logsumexp, params);
}

Forward efficient_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  return in_stripes<efficient>(q, k, v, params);
}

Backward efficient_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                            const AttentionParams& params) {
  return in_stripes<efficient_gradients>(grad_out, grad_logsumexp, q, k, v, out, logsumexp, params);
}

}  // namespace two_level_mha
