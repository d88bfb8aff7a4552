#include "scores.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tanh.h>

#include <algorithm>
#include <limits>

#include "hide.h"

namespace two_level_mha {

namespace {

// Scores at a time, over all batches and heads.
constexpr int64_t kBlockElements = 1 << 22, kBlockElementsCuda = 1 << 26;

bool is_half(const Tensor& x) {
  return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
}

}  // namespace

Tensor times_keys(const Tensor& rows, const Tensor& keys) {
  if (!is_half(keys)) return at::matmul(rows, keys);
  const Tensor of_groups = rows.to(keys.scalar_type()).flatten(2, 3).flatten(0, 1);
  const Tensor product = at::bmm(of_groups, keys.squeeze(2).flatten(0, 1), at::kFloat);
  return product.view({rows.size(0), rows.size(1), rows.size(2), rows.size(3), keys.size(4)});
}

Tensor over_rows(const Tensor& a, const Tensor& b) {
  if (!is_half(b)) return at::matmul(a.transpose(-1, -2), b).sum(2, true);
  auto of_groups = [&](const Tensor& x) { return x.to(b.scalar_type()).flatten(2, 3).flatten(0, 1); };
  const Tensor product = at::bmm(of_groups(a).transpose(1, 2), of_groups(b), at::kFloat);
  return product.view({b.size(0), b.size(1), 1, a.size(4), b.size(4)});
}

Scores::Scores(const Tensor& q_, const Tensor& k_, const AttentionParams& p, Halves given)
    : params(p), halves(given), B(q_.size(0)), H(q_.size(1)), K(k_.size(1)), L(q_.size(2)), S(k_.size(2)) {
  q = grouped(operand(q_));
  k = operand_of_keys(k_);
  const int64_t elements = q.is_cuda() ? kBlockElementsCuda : kBlockElements;
  block = std::clamp<int64_t>(elements / std::max<int64_t>(B * H * S, 1), 16, std::max<int64_t>(L, 16));
}

Tensor Scores::operand_of_keys(const Tensor& x) const {
  const Tensor keys = operand(x);
  return (is_half(keys) ? keys.flatten(0, 1).unflatten(0, {B, K}) : keys).unsqueeze(2);
}

ScoreBlock::ScoreBlock(const Scores& scores, int64_t first)
    : all(scores), row(first), rows(std::min(scores.block, scores.L - first)) {
  key = all.params.keys_of(row, all.S).begin;
  keys = all.params.keys_of(row + rows - 1, all.S).end - key;
}

std::pair<Tensor, Tensor> ScoreBlock::raw() const {
  const Tensor s = times_keys(q(), k().transpose(-1, -2)) * all.params.scale;
  if (all.params.softcap == 0.0) return {s, Tensor()};
  const Tensor t = at::tanh(s / all.params.softcap);
  return {t * all.params.softcap, t};
}

Tensor ScoreBlock::masked(Tensor s) const {
  const AttentionParams& p = all.params;
  if (p.mask.defined()) {
    const Tensor m = group_heads(of_block(p.mask));
    s = m.scalar_type() == at::kBool
            ? s.masked_fill(m.logical_not(), -std::numeric_limits<double>::infinity())
            : (s + m).to(s.scalar_type());  // a float64 mask widens the sum
  }
  return hide(s, {p.causal, p.window, p.key_stride}, row, key);
}

Tensor ScoreBlock::of_block(Tensor mask) const {
  if (mask.size(2) != 1) mask = mask.narrow(2, row, rows);
  if (mask.size(3) != 1) mask = mask.narrow(3, key, keys);
  return mask;
}

Tensor ScoreBlock::group_heads(const Tensor& mask) const {
  return mask.size(1) == 1 ? mask.unsqueeze(2) : mask.unflatten(1, {all.K, all.H / all.K});
}

Tensor weight_sums(const Tensor& q, const Tensor& k, const Tensor& logsumexp, const AttentionParams& params,
                   double unit) {
  AttentionParams in_units = params;
  in_units.scale = params.scale / unit;
  const Scores scores(q, k, in_units);
  Tensor sums = at::empty_like(logsumexp);
  for (int64_t row = 0; row < scores.L; row += scores.block) {
    const ScoreBlock block(scores, row);
    const Tensor lse = logsumexp.narrow(2, row, block.rows) / unit;
    const Tensor s = block.masked(block.raw().first).flatten(1, 2);
    sums.narrow(2, row, block.rows).copy_(at::exp((s - lse.unsqueeze(-1)) * unit).sum(-1));
  }
  return sums;
}

}  // namespace two_level_mha
