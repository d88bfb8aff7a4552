// Forward: a task is a block of rows of one head. It runs over the blocks of keys its rows can see,
//
//   s = Q K^T,   p = exp(s - running max),   O = O * correction + p V,
//
// and divides by the sum of p at the end. K and V are packed once for each KV head, before.
#include "blocked.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "../rows.h"
#include "drop.h"
#include "gemm.h"
#include "problem.h"
#include "tasks.h"

namespace two_level_mha {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T, class C>
class ForwardPass {
 public:
  ForwardPass(const Problem& problem, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const Tensor& logsumexp)
      : p_(problem),
        q_(q),
        k_(k),
        v_(v),
        out_(out),
        logsumexp_(logsumexp.mutable_data_ptr<float>()),
        width_(packed_width<C>(p_.D)),
        width_v_(packed_width<C>(p_.Dv)),
        keys_(p_.B * p_.K * p_.key_blocks() * p_.block_keys * width_),
        values_(p_.B * p_.K * p_.key_blocks() * p_.block_keys * width_v_) {}

  void run() {
    for_each_task<Buffer<C>>(
        p_.B * p_.K * p_.key_blocks(), [&] { return Buffer<C>(p_.block_keys * std::max(width_, width_v_)); },
        [&](Buffer<C>& rows, int64_t task) { pack_keys(rows, task); });
    const int64_t heads = p_.B * p_.H, blocks = p_.row_blocks();
    for_each_task<Scratch>(
        heads * blocks, [&] { return Scratch(*this); },
        // The last rows first: they see the most keys where the attention is causal.
        [&](Scratch& scratch, int64_t task) { attend(scratch, task % heads, blocks - 1 - task / heads); });
  }

 private:
  struct Scratch {
    Buffer<C> query, weights;
    Buffer<float> scores, mask, slope, out;
    Buffer<RunningSoftmax> running;

    explicit Scratch(const ForwardPass& pass)
        : query(pass.p_.block_rows * pass.width_),
          weights(pass.p_.block_rows * pass.p_.block_keys),
          scores(pass.p_.block_rows * pass.p_.block_keys),
          mask(pass.p_.block_keys),
          slope(pass.p_.block_keys),
          out(pass.p_.block_rows * pass.width_v_),
          running(pass.p_.block_rows) {}
  };

  void pack_keys(C* rows, int64_t task) {
    const int64_t head = task / p_.key_blocks(), first = task % p_.key_blocks() * p_.block_keys;
    const int64_t n = std::min(p_.block_keys, p_.S - first), n_padded = padded(n);
    const int64_t batch = head / p_.K, kv_head = head % p_.K;
    copy_rows(head_rows<const T>(k_, batch, kv_head).from(first), n, n_padded, p_.D, rows);
    pack_transposed(rows, n, n_padded, width_, keys_ + task * p_.block_keys * width_);
    pack(rows_as(head_rows<const T>(v_, batch, kv_head).from(first), n, n_padded, p_.Dv, rows), n_padded,
         width_v_, values_ + task * p_.block_keys * width_v_);
  }

  void attend(Scratch& scratch, int64_t head, int64_t block) {
    const int64_t batch = head / p_.H, h = head % p_.H, first = block * p_.block_rows;
    const int64_t rows = std::min(p_.block_rows, p_.L - first);
    const int64_t packed_head = batch * p_.K + h / p_.group;
    copy_rows(head_rows<const T>(q_, batch, h).from(first), rows, rows, p_.D, scratch.query.data());
    std::fill_n(scratch.out.data(), rows * width_v_, 0.f);
    std::fill_n(scratch.running.data(), rows, RunningSoftmax{-kInfinity, 0.f});

    const Range seen = p_.keys_of(Range{first, first + rows});
    for (int64_t j = seen.begin / p_.block_keys; j * p_.block_keys < seen.end; ++j) {
      const int64_t key = j * p_.block_keys, n = std::min(p_.block_keys, p_.S - key), n_padded = padded(n);
      if (p_.mask.defined() && !p_.mask.any(batch, h, first, rows, key, n)) continue;
      const int64_t packed = (packed_head * p_.key_blocks() + j) * p_.block_keys;
      gemm<C>(rows, n_padded, width_, scratch.query, keys_ + packed * width_, scratch.scores, false);
      const float* bias = nullptr;
      for (int64_t r = 0; r < rows; ++r) {
        if (p_.mask.defined() && (r == 0 || !p_.mask.one_row()))
          bias = p_.mask.row(batch, h, first + r, key, n, scratch.mask);
        step(scratch, batch, h, first, r, key, n, bias);
      }
      gemm<C>(rows, width_v_, n_padded, scratch.weights, values_ + packed * width_v_, scratch.out, true);
    }
    finish(scratch, batch, h, first, rows);
  }

  // One row of a block: scores to weights.
  void step(Scratch& scratch, int64_t batch, int64_t h, int64_t first, int64_t r, int64_t key, int64_t n,
            const float* bias) {
    const int64_t at = r * padded(n), row = first + r;
    C* weights = scratch.weights + at;
    const float factor =
        block_weights(p_, row, key, n, scratch.scores + at, bias, scratch.slope, scratch.running[r], weights);
    if (factor != 1.f) scale_row(scratch.out + r * width_v_, width_v_, factor, scratch.out + r * width_v_);
    if (!p_.dropout) return;
    const DropoutRow random = p_.dropout_of(batch, h, row);
    drop_columns(weights, n, random.low, random.high, key, p_.threshold);
  }

  void finish(Scratch& scratch, int64_t batch, int64_t h, int64_t first, int64_t rows) {
    const Rows<T> out = head_rows<T>(out_, batch, h).from(first);
    float* logsumexp = logsumexp_ + (batch * p_.H + h) * p_.L + first;
    for (int64_t r = 0; r < rows; ++r) {
      const RunningSoftmax& running = scratch.running[r];
      const bool sees_none = running.sum == 0.f;
      logsumexp[r] = sees_none ? -kInfinity : running.logsumexp(p_.unit);
      scale_row(scratch.out + r * width_v_, p_.Dv, sees_none ? 0.f : p_.keep_scale / running.sum, out[r]);
    }
  }

  const Problem& p_;
  const Tensor &q_, &k_, &v_, &out_;
  float* logsumexp_;
  int64_t width_, width_v_;
  Buffer<C> keys_, values_;  // packed: (B, K, key blocks, block_keys x width)
};

void forward_into(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params,
                  const Tensor& out, const Tensor& logsumexp) {
  const Problem problem(q, k, v, params);
  const Tensor q_rows = with_rows(q), k_rows = with_rows(k), v_rows = with_rows(v);
  by_type(q.scalar_type(), CpuLevel::avx512_bf16, [&](auto element, auto packed) {
    ForwardPass<decltype(element), decltype(packed)>(problem, q_rows, k_rows, v_rows, out, logsumexp).run();
  });
}

}  // namespace

Forward blocked_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), K = k.size(1), S = k.size(2);
  Tensor out = empty_rows(q, B, H, L, v.size(3));
  Tensor logsumexp = at::empty({B, H, L}, q.options().dtype(at::kFloat));
  if (logsumexp.numel() == 0) return {out, logsumexp};
  if (L != 1 || H == K || params.mask.defined() || params.dropout_p > 0.0) {
    forward_into(q, k, v, params, out, logsumexp);
  } else {  // of one row the heads of a group are rows of one head, so that products have as many rows
    auto of_groups = [&](const Tensor& x) { return x.squeeze(2).unflatten(1, {K, H / K}); };
    const Range seen = params.keys_of(0, S);
    AttentionParams all = params;
    all.causal = all.window = std::nullopt;
    forward_into(of_groups(q), k.narrow(2, seen.begin, seen.end - seen.begin),
                 v.narrow(2, seen.begin, seen.end - seen.begin), all, of_groups(out),
                 logsumexp.view({B, K, H / K}));
  }
  return {out, logsumexp};
}

}  // namespace two_level_mha
