// With few rows the time is that of reading K and V. So they are read once, where they are: the rows of all
// query heads that share a KV head are stacked, and a task is a stretch of the keys of one KV head,
//
//   S^T = K Q^T,   p = exp(s - running max),   O = O * correction + p V,
//
// whose results are merged by their max and sum at the end. Stretches have a fixed length, so that the number
// of threads does not change a bit.
#include "decode.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "../rows.h"
#include "gemm.h"
#include "problem.h"
#include "tasks.h"

namespace two_level_mha {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kFew = 2;  // rows up to which plain loops beat brgemm
constexpr int64_t kStretch = 1024;
constexpr int64_t kChunk = 128;  // keys at a time, so that what is converted or packed stays in cache

// T is the element type of the tensors, C what brgemm reads: float for the few rows that loops take.
template <class T, class C>
class DecodePass {
 public:
  DecodePass(const Problem& problem, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
             const Tensor& logsumexp)
      : p_(problem),
        q_(q),
        k_(k),
        v_(v),
        out_(out),
        logsumexp_(logsumexp.mutable_data_ptr<float>()),
        rows_(p_.group * p_.L),
        width_(packed_width<C>(p_.D)),
        seen_(p_.keys_of(Range{0, p_.L})),
        stretches_(ceil_div(seen_.end - seen_.begin, kStretch)),
        outs_(p_.B * p_.K * stretches_ * rows_ * p_.Dv),
        sums_(p_.B * p_.K * stretches_ * rows_) {}

  void run() {
    for_each_task<Scratch>(
        p_.B * p_.K * stretches_, [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t task) { attend(scratch, task / stretches_, task % stretches_); });
    at::parallel_for(0, p_.B * p_.K, 16, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head)
        for (int64_t r = 0; r < rows_; ++r) merge(head, r);
    });
  }

 private:
  struct Scratch {
    Buffer<C> query, query_t, rows, packed, weights;
    Buffer<float> scores_t, scores, mask, slope;

    explicit Scratch(const DecodePass& pass)
        : query(pass.rows_ * pass.width_),
          query_t(pass.rows_ * pass.width_),
          rows(kChunk * std::max(pass.width_, packed_width<C>(pass.p_.Dv))),
          packed(kChunk * pass.p_.Dv),
          weights(kChunk * pass.rows_),
          scores_t(kChunk * pass.rows_),
          scores(kChunk * pass.rows_),
          mask(kChunk),
          slope(kChunk) {}
  };

  void attend(Scratch& scratch, int64_t head, int64_t stretch) {
    const int64_t batch = head / p_.K, kv_head = head % p_.K, task = head * stretches_ + stretch;
    load_queries(scratch, batch, kv_head);
    float* out = outs_ + task * rows_ * p_.Dv;
    RunningSoftmax* sums = sums_ + task * rows_;
    std::fill_n(out, rows_ * p_.Dv, 0.f);
    std::fill_n(sums, rows_, RunningSoftmax{-kInfinity, 0.f});

    const Rows<const T> keys = head_rows<const T>(k_, batch, kv_head);
    const Rows<const T> values = head_rows<const T>(v_, batch, kv_head);
    const int64_t first = seen_.begin + stretch * kStretch, end = std::min(first + kStretch, seen_.end);
    for (int64_t key = first; key < end; key += kChunk) {
      const int64_t n = std::min(kChunk, end - key);
      if (p_.mask.defined() && !any_visible(batch, kv_head, key, n)) continue;
      multiply_keys(scratch, keys.from(key), n);
      for (int64_t r = 0; r < rows_; ++r) {
        expect_keys(keys.from(key + kChunk), r);
        const int64_t at = r * padded(n);
        const float* bias = p_.mask.defined() ? p_.mask.row(batch, kv_head * p_.group + r / p_.L, r % p_.L,
                                                            key, n, scratch.mask)
                                              : nullptr;
        const float factor = block_weights(p_, r % p_.L, key, n, scratch.scores + at, bias, scratch.slope,
                                           sums[r], scratch.weights + at);
        if (factor != 1.f) scale_row(out + r * p_.Dv, p_.Dv, factor, out + r * p_.Dv);
      }
      add_values(scratch, values.from(key), n, out);
    }
  }

  void multiply_keys(Scratch& scratch, Rows<const T> keys, int64_t n) {
    const int64_t n_padded = padded(n);
    if constexpr (std::is_same_v<C, float>)
      if (rows_ <= kFew) {
        for (int64_t r = 0; r < rows_; ++r)
          dot_rows(keys.data, keys.stride, n, p_.D, scratch.query + r * p_.D, scratch.scores + r * n_padded);
        return;
      }
    const Rows<const C> A = rows_as(keys, n, n_padded, p_.D, scratch.rows.data());
    gemm<C>(n_padded, rows_, width_, A.data, A.stride, scratch.query_t, scratch.scores_t, false);
    transpose(scratch.scores_t, n_padded, rows_, scratch.scores);
  }

  void add_values(Scratch& scratch, Rows<const T> values, int64_t n, float* out) {
    const int64_t n_padded = padded(n);
    if constexpr (std::is_same_v<C, float>)
      if (rows_ <= kFew) {
        for (int64_t r = 0; r < rows_; ++r)
          add_rows(values.data, values.stride, n, p_.Dv, scratch.weights + r * n_padded, out + r * p_.Dv);
        return;
      }
    const Rows<const C> B = rows_as(values, n, n_padded, p_.Dv, scratch.rows.data());
    if constexpr (std::is_same_v<C, float>) {
      gemm_rows(rows_, p_.Dv, n_padded, scratch.weights, n_padded, B.data, B.stride, out, true);
    } else {
      pack(B, n_padded, p_.Dv, scratch.packed);
      gemm<C>(rows_, p_.Dv, n_padded, scratch.weights, scratch.packed, out, true);
    }
  }

  // Asks for row r's share of the next keys: brgemm does not ask ahead.
  void expect_keys(Rows<const T> next, int64_t r) {
    if (rows_ <= kFew) return;
    const int64_t share = ceil_div(kChunk, rows_), begin = std::min(r * share, kChunk);
    for (int64_t y = begin; y < std::min(begin + share, kChunk); ++y) expect(next[y], p_.D);
  }

  // As rows for the loops, as panels for the gemm.
  void load_queries(Scratch& scratch, int64_t batch, int64_t kv_head) {
    for (int64_t member = 0; member < p_.group; ++member)
      copy_rows(head_rows<const T>(q_, batch, kv_head * p_.group + member), p_.L, p_.L, p_.D,
                scratch.query + member * p_.L * width_);
    if (rows_ > kFew) pack_transposed(scratch.query, rows_, rows_, width_, scratch.query_t);
  }

  bool any_visible(int64_t batch, int64_t kv_head, int64_t key, int64_t n) {
    for (int64_t member = 0; member < p_.group; ++member)
      if (p_.mask.any(batch, kv_head * p_.group + member, 0, p_.L, key, n)) return true;
    return false;
  }

  void merge(int64_t head, int64_t r) {
    auto sums = [&](int64_t stretch) { return sums_[(head * stretches_ + stretch) * rows_ + r]; };
    RunningSoftmax all{-kInfinity, 0.f};
    for (int64_t i = 0; i < stretches_; ++i) all.max = std::max(all.max, sums(i).max);
    const int64_t batch = head / p_.K, h = head % p_.K * p_.group + r / p_.L, row = r % p_.L;
    Buffer<float> merged(p_.Dv);
    std::fill_n(merged.data(), p_.Dv, 0.f);
    for (int64_t i = 0; i < stretches_; ++i) {
      if (sums(i).sum == 0.f) continue;
      const float weight = std::exp((sums(i).max - all.max) * p_.unit);
      all.sum += weight * sums(i).sum;
      add_row(outs_ + ((head * stretches_ + i) * rows_ + r) * p_.Dv, p_.Dv, weight, merged);
    }
    logsumexp_[(batch * p_.H + h) * p_.L + row] = all.sum == 0.f ? -kInfinity : all.logsumexp(p_.unit);
    scale_row(merged, p_.Dv, all.sum == 0.f ? 0.f : 1.f / all.sum, head_rows<T>(out_, batch, h)[row]);
  }

  const Problem& p_;
  const Tensor &q_, &k_, &v_, &out_;
  float* logsumexp_;
  int64_t rows_;  // of all query heads of a KV head
  int64_t width_;
  Range seen_;  // keys that any row sees
  int64_t stretches_;
  Buffer<float> outs_;           // (B, K, stretches, rows, Dv)
  Buffer<RunningSoftmax> sums_;  // (B, K, stretches, rows)
};

}  // namespace

Forward decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  const Problem problem(q, k, v, params);
  Tensor out = empty_rows(q, problem.B, problem.H, problem.L, problem.Dv);
  Tensor logsumexp = at::empty({problem.B, problem.H, problem.L}, q.options().dtype(at::kFloat));
  if (logsumexp.numel() == 0) return {out, logsumexp};
  const Tensor q_rows = with_rows(q), k_rows = with_rows(k), v_rows = with_rows(v);
  by_type(q.scalar_type(), CpuLevel::amx, [&](auto element, auto packed) {
    using T = decltype(element);
    if (problem.group * problem.L <= kFew)
      DecodePass<T, float>(problem, q_rows, k_rows, v_rows, out, logsumexp).run();
    else
      DecodePass<T, decltype(packed)>(problem, q_rows, k_rows, v_rows, out, logsumexp).run();
  });
  return {out, logsumexp};
}

}  // namespace two_level_mha
