#include "chunked.h"

#include "partial_attention.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace two_level_mha {

namespace {

// Scores at a time, over all batches and heads.
constexpr int64_t kBlockElements = 1 << 22, kBlockElementsCuda = 1 << 26;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Half precision is computed in float32.
Tensor wide(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
}

// Everything of a call that does not depend on the block.
struct Call {
  const AttentionParams& params;
  Tensor q, k, v;  // (B, K, G, L, D), (B, K, 1, S, D), (B, K, 1, S, Dv), wide
  int64_t B, H, K, L, S;
  int64_t block;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const AttentionParams& p)
      : params(p), B(q_.size(0)), H(q_.size(1)), K(k_.size(1)), L(q_.size(2)), S(k_.size(2)) {
    q = grouped(q_);
    k = wide(k_).unsqueeze(2);
    v = wide(v_).unsqueeze(2);
    const int64_t elements = q.is_cuda() ? kBlockElementsCuda : kBlockElements;
    block = std::clamp<int64_t>(elements / std::max<int64_t>(B * H * S, 1), 16, std::max<int64_t>(L, 16));
  }
  Tensor grouped(const Tensor& x) const { return wide(x).unflatten(1, {K, H / K}); }
};

// One block of rows against the keys it can see.
struct Block {
  const Call& call;
  int64_t row, rows, key, keys;

  Block(const Call& c, int64_t first) : call(c), row(first), rows(std::min(c.block, c.L - first)) {
    key = c.params.keys_of(row, c.S).begin;
    keys = c.params.keys_of(row + rows - 1, c.S).end - key;
  }
  Tensor of_rows(const Tensor& x) const { return x.narrow(-2, row, rows); }
  Tensor of_keys(const Tensor& x) const { return x.narrow(-2, key, keys); }
  Tensor q() const { return of_rows(call.q); }
  Tensor k() const { return of_keys(call.k); }
  Tensor v() const { return of_keys(call.v); }

  // The mask's part for this block, (b, h, r, s) or broadcast.
  Tensor mask() const {
    Tensor m = call.params.mask;
    if (m.size(2) != 1) m = m.narrow(2, row, rows);
    if (m.size(3) != 1) m = m.narrow(3, key, keys);
    return m;
  }
  Tensor group_heads(const Tensor& m) const {
    return m.size(1) == 1 ? m.unsqueeze(2) : m.unflatten(1, {call.K, call.H / call.K});
  }

  // scores before the mask, and tanh(x / c) where there is a soft cap
  std::pair<Tensor, Tensor> raw_scores() const {
    Tensor s = at::matmul(q(), k().transpose(-1, -2)) * call.params.scale;
    if (call.params.softcap == 0.0) return {s, Tensor()};
    Tensor t = at::tanh(s / call.params.softcap);
    return {t * call.params.softcap, t};
  }

  Tensor hide(Tensor s) const {
    if (call.params.mask.defined()) {
      Tensor m = group_heads(mask());
      s = m.scalar_type() == at::kBool ? s.masked_fill(m.logical_not(), -kInfinity)
                                       : (s + m).to(s.scalar_type());  // a float64 mask widens the sum
    }
    if (call.params.causal) {
      auto options = s.options().dtype(at::kLong);
      Tensor last = at::arange(row, row + rows, options).unsqueeze(1) + *call.params.causal;
      Tensor position = at::arange(key, key + keys, options) * call.params.key_stride;
      Tensor hidden = position > last;
      if (call.params.window) hidden = hidden.logical_or(position <= last - *call.params.window);
      s = s.masked_fill(hidden, -kInfinity);
    }
    return s;
  }

  // keep / (1 - p), or undefined without dropout
  Tensor keep(at::ScalarType dtype) const {
    const auto& p = call.params;
    if (p.dropout_p == 0.0) return Tensor();
    // the counter starts at column 0
    Tensor kept =
        dropout_keep_mask(p.seed, p.dropout_p, std::vector<c10::SymInt>{call.B, call.H, rows, key + keys},
                          std::vector<c10::SymInt>{p.origin[0], p.origin[1], p.origin[2] + row});
    Tensor factor = group_heads(kept.narrow(3, key, keys)).to(dtype);
    return p.dropout_p < 1.0 ? factor.div_(1.0 - p.dropout_p) : factor;  // at 1 nothing is kept
  }
};

// Not exp(s - logsumexp): at finfo.min a logsumexp has no room for log(n).
Tensor softmax(const Tensor& s, const Tensor& logsumexp) {
  return at::softmax(s, -1).masked_fill_((logsumexp == -kInfinity).unsqueeze(-1), 0.0);
}

}  // namespace

Tensor empty_rows(const Tensor& like, c10::SymInt B, c10::SymInt H, c10::SymInt L, c10::SymInt D) {
  return at::empty_symint({B, L, H, D}, like.options()).transpose(1, 2);
}

Forward chunked_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  Call call(q, k, v, params);
  Tensor out = empty_rows(q, call.B, call.H, call.L, v.size(3));
  Tensor logsumexp = at::empty({call.B, call.H, call.L}, call.q.options());
  for (int64_t row = 0; row < call.L; row += call.block) {
    Block block(call, row);
    Tensor s = block.hide(block.raw_scores().first);
    Tensor lse = block.keys ? at::logsumexp(s, -1) : s.sum(-1).fill_(-kInfinity);
    Tensor p = softmax(s, lse);
    if (Tensor keep = block.keep(p.scalar_type()); keep.defined()) p = p * keep;
    out.narrow(2, row, block.rows).copy_(at::matmul(p, block.v()).flatten(1, 2));
    logsumexp.narrow(2, row, block.rows).copy_(lse.flatten(1, 2));
  }
  return {out, logsumexp};
}

Tensor weight_sums(const Tensor& q, const Tensor& k, const Tensor& logsumexp, const AttentionParams& params) {
  Call call(q, k, k, params);
  Tensor sums = at::empty_like(logsumexp);
  for (int64_t row = 0; row < call.L; row += call.block) {
    Block block(call, row);
    Tensor lse = logsumexp.narrow(2, row, block.rows);
    Tensor s = block.hide(block.raw_scores().first).flatten(1, 2);
    sums.narrow(2, row, block.rows).copy_(at::exp(s - lse.unsqueeze(-1)).sum(-1));
  }
  return sums;
}

Backward chunked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params, bool mask_grad) {
  Call call(q, k, v, params);
  Tensor go = call.grouped(grad_out), lse = logsumexp.unflatten(1, {call.K, call.H / call.K});
  Tensor delta = (go * call.grouped(out)).sum(-1);
  if (grad_logsumexp.defined()) delta = delta - grad_logsumexp.unflatten(1, {call.K, call.H / call.K});
  Tensor dq = empty_rows(q, call.B, call.H, call.L, q.size(3));
  Tensor dk = at::zeros_like(call.k), dv = at::zeros_like(call.v), dmask;
  if (mask_grad) dmask = at::zeros(params.mask.sizes(), params.mask.options().dtype(call.q.scalar_type()));
  for (int64_t row = 0; row < call.L; row += call.block) {
    Block block(call, row);
    auto rows_of = [&](const Tensor& x) { return x.narrow(3, row, block.rows); };
    auto [raw, tanh] = block.raw_scores();
    Tensor p = softmax(block.hide(raw), rows_of(lse));
    Tensor keep = block.keep(p.scalar_type()), g = block.of_rows(go);
    Tensor dp = at::matmul(g, block.v().transpose(-1, -2));
    if (keep.defined()) dp = dp * keep;
    block.of_keys(dv).add_(at::matmul((keep.defined() ? p * keep : p).transpose(-1, -2), g).sum(2, true));
    Tensor ds = p * (dp - rows_of(delta).unsqueeze(-1));
    if (mask_grad) {
      Tensor part = dmask;
      if (part.size(2) != 1) part = part.narrow(2, row, block.rows);
      if (part.size(3) != 1) part = part.narrow(3, block.key, block.keys);
      part.add_(ds.flatten(1, 2).sum_to_size(part.sizes()));
    }
    if (tanh.defined()) ds = ds * (1.0 - tanh * tanh);
    ds = ds * params.scale;
    dq.narrow(2, row, block.rows).copy_(at::matmul(ds, block.k()).flatten(1, 2));
    block.of_keys(dk).add_(at::matmul(ds.transpose(-1, -2), block.q()).sum(2, true));
  }
  auto as = [&](const Tensor& grad, const Tensor& like) {
    Tensor x = empty_rows(like, call.B, call.K, call.S, like.size(3));
    return x.copy_(grad.squeeze(2));
  };
  if (mask_grad) dmask = dmask.to(params.mask.scalar_type());
  return {dq, as(dk, k), as(dv, v), dmask};
}

}  // namespace two_level_mha
