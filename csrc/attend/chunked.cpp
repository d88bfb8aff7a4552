#include "chunked.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "dropout_mask.h"
#include "machine.h"
#include "rows.h"

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

// GPUs before sm_80 do not multiply bfloat16.
Halves halves_on(const Tensor& q) {
  const bool multiplies = q.is_cuda() && (q.scalar_type() == at::kHalf || machine_of(q).arch >= 80);
  return multiplies ? Halves::as_they_are : Halves::widened;
}

}  // namespace

Forward chunked_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  return chunked_forward(q, k, v, params, halves_on(q));
}

Backward chunked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params) {
  return chunked_backward(grad_out, grad_logsumexp, q, k, v, out, logsumexp, params, halves_on(q));
}

Forward chunked_forward(const Tensor& q, const Tensor& k, const Tensor& v_, const AttentionParams& params,
                        Halves halves) {
  const Scores scores(q, k, params, halves);
  const Tensor v = scores.operand_of_keys(v_);
  Tensor out = empty_rows(q, scores.B, scores.H, scores.L, v.size(-1));
  Tensor logsumexp = at::empty({scores.B, scores.H, scores.L}, q.options().dtype(scores.sums()));
  for (int64_t row = 0; row < scores.L; row += scores.block) {
    const ScoreBlock block(scores, row);
    const Tensor s = block.masked(block.raw().first);
    const Tensor lse = block.keys ? at::logsumexp(s, -1) : s.sum(-1).fill_(-kInfinity);
    Tensor p = softmax(s, lse);
    if (const Tensor keep = keep_of(block, p.scalar_type()); keep.defined()) p = p * keep;
    out.narrow(2, row, block.rows).copy_(times_keys(p, block.of_keys(v)).flatten(1, 2));
    logsumexp.narrow(2, row, block.rows).copy_(lse.flatten(1, 2));
  }
  return {out, logsumexp};
}

Backward chunked_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                          const Tensor& k, const Tensor& v_, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params, Halves halves) {
  const Scores scores(q, k, params, halves);
  const Tensor v = scores.operand_of_keys(v_), go = scores.grouped(scores.operand(grad_out));
  const Tensor lse = scores.grouped(logsumexp);
  Tensor delta = scores.grouped((scores.wide(grad_out) * scores.wide(out)).sum(-1));
  if (grad_logsumexp.defined()) delta = delta - scores.grouped(grad_logsumexp);
  Tensor dq = empty_rows(q, scores.B, scores.H, scores.L, q.size(3));
  const auto sums = q.options().dtype(scores.sums());
  Tensor dk = at::zeros(scores.k.sizes(), sums), dv = at::zeros(v.sizes(), sums), dmask;
  if (params.mask_grad) dmask = at::zeros(params.mask.sizes(), sums);
  for (int64_t row = 0; row < scores.L; row += scores.block) {
    const ScoreBlock block(scores, row);
    auto rows_of = [&](const Tensor& x) { return x.narrow(3, row, block.rows); };
    const auto [raw, tanh] = block.raw();
    const Tensor p = softmax(block.masked(raw), rows_of(lse));
    const Tensor keep = keep_of(block, p.scalar_type()), g = block.of_rows(go);
    Tensor dp = times_keys(g, block.of_keys(v).transpose(-1, -2));
    if (keep.defined()) dp = dp * keep;
    block.of_keys(dv).add_(over_rows(keep.defined() ? p * keep : p, g));
    Tensor ds = p * (dp - rows_of(delta).unsqueeze(-1));
    if (params.mask_grad) {
      Tensor part = block.of_block(dmask);
      part.add_(ds.flatten(1, 2).sum_to_size(part.sizes()));
    }
    if (tanh.defined()) ds = ds * (1.0 - tanh * tanh);
    ds = ds * params.scale;
    dq.narrow(2, row, block.rows).copy_(times_keys(ds, block.k()).flatten(1, 2));
    block.of_keys(dk).add_(over_rows(ds, block.q()));
  }
  auto as = [&](const Tensor& grad, const Tensor& like) {
    Tensor x = empty_rows(like, scores.B, scores.K, scores.S, like.size(3));
    return x.copy_(grad.squeeze(2));
  };
  if (params.mask_grad) dmask = dmask.to(params.mask.scalar_type());
  return {dq, as(dk, k), as(dv, v_), dmask};
}

}  // namespace two_level_mha
