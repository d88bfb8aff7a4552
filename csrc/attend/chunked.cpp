#include "chunked.h"

#include <ATen/ATen.h>

#include <limits>

#include "dropout_mask.h"
#include "rows.h"
#include "scores.h"

namespace two_level_mha {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// keep / (1 - p) of a block, or undefined without dropout.
Tensor keep_of(const ScoreBlock& block, at::ScalarType dtype) {
  const AttentionParams& p = block.all.params;
  if (p.dropout_p == 0.0) return Tensor();
  // the counter starts at column 0
  const Tensor kept = dropout_keep_mask(
      p.seed, p.dropout_p,
      std::vector<c10::SymInt>{block.all.B, block.all.H, block.rows, block.key + block.keys},
      std::vector<c10::SymInt>{p.origin[0], p.origin[1], p.origin[2] + block.row});
  Tensor factor = block.group_heads(kept.narrow(3, block.key, block.keys)).to(dtype);
  return p.dropout_p < 1.0 ? factor.div_(1.0 - p.dropout_p) : factor;  // at 1 nothing is kept
}

// Not exp(s - logsumexp): at finfo.min a logsumexp has no room for log(n).
Tensor softmax(const Tensor& s, const Tensor& logsumexp) {
  return at::softmax(s, -1).masked_fill_((logsumexp == -kInfinity).unsqueeze(-1), 0.0);
}

}  // namespace

Forward chunked_forward(const Tensor& q, const Tensor& k, const Tensor& v_, const AttentionParams& params) {
  const Scores scores(q, k, params);
  const Tensor v = scores.wide(v_).unsqueeze(2);
  Tensor out = empty_rows(q, scores.B, scores.H, scores.L, v.size(-1));
  Tensor logsumexp = at::empty({scores.B, scores.H, scores.L}, scores.q.options());
  for (int64_t row = 0; row < scores.L; row += scores.block) {
    const ScoreBlock block(scores, row);
    const Tensor s = block.masked(block.raw().first);
    const Tensor lse = block.keys ? at::logsumexp(s, -1) : s.sum(-1).fill_(-kInfinity);
    Tensor p = softmax(s, lse);
    if (const Tensor keep = keep_of(block, p.scalar_type()); keep.defined()) p = p * keep;
    out.narrow(2, row, block.rows).copy_(at::matmul(p, block.of_keys(v)).flatten(1, 2));
    logsumexp.narrow(2, row, block.rows).copy_(lse.flatten(1, 2));
  }
  return {out, logsumexp};
}

Backward chunked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v_, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params) {
  const Scores scores(q, k, params);
  const Tensor v = scores.wide(v_).unsqueeze(2), go = scores.grouped(grad_out);
  auto by_groups = [&](const Tensor& x) { return x.unflatten(1, {scores.K, scores.H / scores.K}); };
  const Tensor lse = by_groups(logsumexp);
  Tensor delta = (go * scores.grouped(out)).sum(-1);
  if (grad_logsumexp.defined()) delta = delta - by_groups(grad_logsumexp);
  Tensor dq = empty_rows(q, scores.B, scores.H, scores.L, q.size(3));
  Tensor dk = at::zeros_like(scores.k), dv = at::zeros_like(v), dmask;
  if (params.mask_grad)
    dmask = at::zeros(params.mask.sizes(), params.mask.options().dtype(scores.q.scalar_type()));
  for (int64_t row = 0; row < scores.L; row += scores.block) {
    const ScoreBlock block(scores, row);
    auto rows_of = [&](const Tensor& x) { return x.narrow(3, row, block.rows); };
    const auto [raw, tanh] = block.raw();
    const Tensor p = softmax(block.masked(raw), rows_of(lse));
    const Tensor keep = keep_of(block, p.scalar_type()), g = block.of_rows(go);
    Tensor dp = at::matmul(g, block.of_keys(v).transpose(-1, -2));
    if (keep.defined()) dp = dp * keep;
    block.of_keys(dv).add_(at::matmul((keep.defined() ? p * keep : p).transpose(-1, -2), g).sum(2, true));
    Tensor ds = p * (dp - rows_of(delta).unsqueeze(-1));
    if (params.mask_grad) {
      Tensor part = block.of_block(dmask);
      part.add_(ds.flatten(1, 2).sum_to_size(part.sizes()));
    }
    if (tanh.defined()) ds = ds * (1.0 - tanh * tanh);
    ds = ds * params.scale;
    dq.narrow(2, row, block.rows).copy_(at::matmul(ds, block.k()).flatten(1, 2));
    block.of_keys(dk).add_(at::matmul(ds.transpose(-1, -2), block.q()).sum(2, true));
  }
  auto as = [&](const Tensor& grad, const Tensor& like) {
    Tensor x = empty_rows(like, scores.B, scores.K, scores.S, like.size(3));
    return x.copy_(grad.squeeze(2));
  };
  if (params.mask_grad) dmask = dmask.to(params.mask.scalar_type());
  return {dq, as(dk, k), as(dv, v_), dmask};
}

}  // namespace two_level_mha
