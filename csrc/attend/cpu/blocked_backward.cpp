// Backward, from P = exp(s - logsumexp) and delta = sum(dO * O) - dlogsumexp. A task is a KV head, or a share
// of its key blocks where there are fewer heads than threads. It works on transposed blocks, (keys, queries),
//
//   S^T = K Q^T,  dP^T = V dO^T,  dS = P * (dP - delta),  dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T,
//
// so that no block is ever transposed and logsumexp and delta lie along the rows. Only dQ^T is, once, at the
// end. Every share has a dQ^T of its own and they are summed in order: no atomics, the same bits in every
// run. Shares read their heads' rows from one place.
#include "blocked.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../rows.h"
#include "../scores.h"
#include "drop.h"
#include "gemm.h"
#include "problem.h"
#include "tasks.h"

namespace two_level_mha {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Tensors {
  const Tensor &grad_out, &grad_logsumexp, &q, &k, &v, &out, &logsumexp, &dq, &dk, &dv;
};

template <class T, class C>
class BackwardPass {
 public:
  BackwardPass(const Problem& problem, const Tensors& tensors)
      : p_(problem),
        t_(tensors),
        width_(packed_width<C>(p_.D)),
        width_v_(packed_width<C>(p_.Dv)),
        rows_(p_.row_blocks() * p_.block_rows),
        shares_(std::clamp<int64_t>(ceil_div(at::get_num_threads(), p_.B * p_.K), 1, p_.key_blocks())),
        block_(p_.block_rows * p_.block_keys),
        packs_(!kRows || (cpu_level() == CpuLevel::avx2 && std::max(width_, width_v_) >= 128)),
        shared_heads_(*this, shares_ > 1 ? p_.B * p_.H : 0),
        shared_dq_(shares_ > 1 ? p_.B * p_.H * shares_ * rows_ * width_ : 0) {}

  void run() {
    if (shares_ > 1)
      for_each_task<Buffer<C>>(
          p_.B * p_.H * p_.row_blocks(), [&] { return Buffer<C>(packed_rows()); },
          [&](Buffer<C>& rows, int64_t task) {
            const int64_t head = task / p_.row_blocks(), i = task % p_.row_blocks();
            load_rows(rows, shared_heads_.of(*this, head), head / p_.H, head % p_.H, i * p_.block_rows);
          });
    for_each_task<Scratch>(
        p_.B * p_.K * shares_, [&] { return Scratch(*this); },
        [&](Scratch& scratch, int64_t task) { differentiate(scratch, task / shares_, task % shares_); });
    if (shares_ == 1) return;
    for_each_task<Buffer<float>>(
        p_.B * p_.H * p_.row_blocks(), [&] { return Buffer<float>(kStripe * width_); },
        [&](Buffer<float>& stripe, int64_t task) {
          const int64_t head = task / p_.row_blocks();
          finish_queries(stripe, head, task % p_.row_blocks(), shared_dq_ + head * shares_ * rows_ * width_,
                         shares_);
        });
  }

 private:
  // Whether a gemm may read Q, dO and dS as rows. With AVX2 wide ones are faster in panels.
  static constexpr bool kRows = std::is_same_v<T, float>;
  static constexpr int64_t kStripe = 16;

  // A head: Q^T and dO^T in panels, Q and dO too unless read in place, one number for each row.
  struct Head {
    C *query_t, *grad_t, *query, *grad;
    float *logsumexp, *delta;
    uint32_t *low, *high;
  };

  struct Heads {
    Buffer<C> query_t, grad_t, query, grad;
    Buffer<float> logsumexp, delta;
    Buffer<uint32_t> low, high;

    Heads(const BackwardPass& pass, int64_t heads)
        : query_t(heads * pass.rows_ * pass.width_),
          grad_t(heads * pass.rows_ * pass.width_v_),
          query(pass.packs_ ? heads * pass.rows_ * pass.width_ : 0),
          grad(pass.packs_ ? heads * pass.rows_ * pass.width_v_ : 0),
          logsumexp(heads * pass.rows_),
          delta(heads * pass.rows_),
          low(pass.p_.dropout ? heads * pass.rows_ : 0),
          high(pass.p_.dropout ? heads * pass.rows_ : 0) {}

    Head of(const BackwardPass& pass, int64_t i) {
      const int64_t row = i * pass.rows_, q = row * pass.width_, g = row * pass.width_v_;
      return {query_t + q,     grad_t + g,  query + q, grad + g,
              logsumexp + row, delta + row, low + row, high + row};
    }
  };

  struct Scratch {
    Heads head;  // unless heads are shared
    Buffer<float> zeros, dq;
    // The keys: K and V as rows, K^T as rows, dK and dV. With groups the latter are of the whole head.
    Buffer<C> key, value, key_t;
    Buffer<float> dk, dv;
    // The block.
    Buffer<C> rows, weights, grad_scores, grad_packed;
    Buffer<float> scores, grad_weights, mask, slope, stripe;
    Buffer<uint32_t> kept;

    explicit Scratch(const BackwardPass& pass)
        : head(pass, pass.shares_ > 1 ? 0 : 1),
          zeros(pass.p_.block_rows),
          dq(pass.shares_ > 1 ? 0 : pass.rows_ * pass.width_),
          key(pass.p_.block_keys * pass.width_),
          value(pass.p_.block_keys * pass.width_v_),
          key_t(pass.p_.block_keys * pass.width_),
          dk(pass.accumulated_keys() * pass.width_),
          dv(pass.accumulated_keys() * pass.width_v_),
          rows(pass.packed_rows()),
          weights(pass.block_),
          grad_scores(pass.block_),
          grad_packed(pass.packs_ ? pass.block_ : 0),
          scores(pass.block_),
          grad_weights(pass.block_),
          mask(pass.p_.mask.defined() ? kStripe * pass.p_.block_rows : 0),
          slope(pass.p_.block_rows),
          stripe(kStripe * pass.width_),
          kept(pass.p_.block_rows) {
      std::fill_n(zeros.data(), pass.p_.block_rows, 0.f);
    }
  };

  int64_t packed_rows() const { return p_.block_rows * std::max(width_, width_v_); }
  int64_t accumulated_keys() const { return p_.group > 1 ? p_.key_blocks() * p_.block_keys : p_.block_keys; }

  void differentiate(Scratch& scratch, int64_t kv_head, int64_t share) {
    const int64_t batch = kv_head / p_.K;
    if (p_.group > 1) {
      std::fill_n(scratch.dk.data(), accumulated_keys() * width_, 0.f);
      std::fill_n(scratch.dv.data(), accumulated_keys() * width_v_, 0.f);
    }
    for (int64_t member = 0; member < p_.group; ++member) {
      const int64_t head = batch * p_.H + kv_head % p_.K * p_.group + member;
      const Head rows = shares_ > 1 ? shared_heads_.of(*this, head) : scratch.head.of(*this, 0);
      float* dq = shares_ > 1 ? shared_dq_ + (head * shares_ + share) * rows_ * width_ : scratch.dq.data();
      std::fill_n(dq, rows_ * width_, 0.f);
      for (int64_t first = 0; shares_ == 1 && first < p_.L; first += p_.block_rows)
        load_rows(scratch.rows, rows, batch, head % p_.H, first);
      for (int64_t j = share; j < p_.key_blocks(); j += shares_) {
        const int64_t offset = p_.group > 1 ? j * p_.block_keys : 0;
        float *dk = scratch.dk + offset * width_, *dv = scratch.dv + offset * width_v_;
        if (p_.group == 1) {
          std::fill_n(dk, p_.block_keys * width_, 0.f);
          std::fill_n(dv, p_.block_keys * width_v_, 0.f);
        }
        load_keys(scratch, batch, kv_head % p_.K, j);
        accumulate(scratch, rows, batch, head % p_.H, j, dq, dk, dv);
        if (member == p_.group - 1) store_keys(batch, kv_head % p_.K, j, dk, dv);
      }
      if (shares_ > 1) continue;
      for (int64_t i = 0; i < p_.row_blocks(); ++i) finish_queries(scratch.stripe, head, i, dq, 1);
    }
  }

  // A block of rows of a head.
  void load_rows(C* rows, const Head& head, int64_t batch, int64_t h, int64_t first) {
    const Rows<const T> q = head_rows<const T>(t_.q, batch, h), g = head_rows<const T>(t_.grad_out, batch, h),
                        out = head_rows<const T>(t_.out, batch, h);
    const int64_t n = std::min(p_.block_rows, p_.L - first), at = (batch * p_.H + h) * p_.L;
    const float* logsumexp = t_.logsumexp.template const_data_ptr<float>() + at;
    const float* grad_logsumexp =
        t_.grad_logsumexp.defined() ? t_.grad_logsumexp.template const_data_ptr<float>() + at : nullptr;
    load_operand(rows, q.from(first), n, p_.D, head.query_t + first * width_, head.query + first * width_);
    load_operand(rows, g.from(first), n, p_.Dv, head.grad_t + first * width_v_, head.grad + first * width_v_);
    for (int64_t row = first; row < first + padded(n); ++row) {
      // Rows that see nothing, and rows of padding, get P = exp(-inf) = 0.
      const bool sees = row < p_.L && logsumexp[row] != -kInfinity;
      head.logsumexp[row] = sees ? logsumexp[row] / p_.unit : kInfinity;
      head.delta[row] = sees ? dot(out[row], g[row], p_.Dv) : 0.f;
      if (sees && grad_logsumexp) head.delta[row] -= grad_logsumexp[row];
      if (!p_.dropout) continue;
      const DropoutRow random = p_.dropout_of(batch, h, row);
      head.low[row] = random.low;
      head.high[row] = random.high;
    }
  }

  // Rows of Q or dO: transposed to panels, and once more as the B operand of dK or dV.
  void load_operand(C* rows, Rows<const T> from, int64_t n, int64_t width, C* transposed, C* operand) {
    const int64_t wide = packed_width<C>(width), n_padded = padded(n);
    copy_rows(from, n, n_padded, width, rows);
    pack_transposed(rows, n, n_padded, wide, transposed);
    if (packs_) pack({rows, wide}, n_padded, wide, operand);
  }

  void load_keys(Scratch& scratch, int64_t batch, int64_t kv_head, int64_t j) {
    const int64_t first = j * p_.block_keys, n = std::min(p_.block_keys, p_.S - first), n_padded = padded(n);
    copy_rows(head_rows<const T>(t_.k, batch, kv_head).from(first), n, n_padded, p_.D, scratch.key.data());
    copy_rows(head_rows<const T>(t_.v, batch, kv_head).from(first), n, n_padded, p_.Dv, scratch.value.data());
    transpose(scratch.key, n_padded, width_, scratch.key_t);
  }

  // Key block j against every block of rows that sees it.
  void accumulate(Scratch& scratch, const Head& head, int64_t batch, int64_t h, int64_t j, float* dq,
                  float* dk, float* dv) {
    const int64_t key = j * p_.block_keys, n = std::min(p_.block_keys, p_.S - key), n_padded = padded(n);
    const Range seen = p_.rows_of(Range{key, key + n});
    if (seen.empty()) return;
    for (int64_t first = seen.begin / p_.block_rows * p_.block_rows; first < seen.end;
         first += p_.block_rows) {
      const int64_t r = std::min(p_.block_rows, p_.L - first), r_padded = padded(r);
      if (p_.mask.defined() && !p_.mask.any(batch, h, first, r, key, n)) continue;
      gemm<C>(n, r_padded, width_, scratch.key, head.query_t + first * width_, scratch.scores, false);
      gemm<C>(n, r_padded, width_v_, scratch.value, head.grad_t + first * width_v_, scratch.grad_weights,
              false);
      for (int64_t y = 0; y < n; ++y) {
        if (p_.mask.defined()) {
          if (y % kStripe == 0)
            p_.mask.load_transposed(batch, h, first, r, key + y, std::min(kStripe, n - y), scratch.mask,
                                    r_padded);
          expect_mask(batch, h, first, key, n, y);
        }
        step(scratch, head, first, r, key, y);
      }
      std::memset(static_cast<void*>(scratch.grad_scores + n * r_padded), 0,
                  (n_padded - n) * r_padded * sizeof(C));
      add_keys(scratch.weights, n, r, head_rows<const T>(t_.grad_out, batch, h).from(first), width_v_,
               head.grad + first * width_v_, dv);
      add_keys(scratch.grad_scores, n, r, head_rows<const T>(t_.q, batch, h).from(first), width_,
               head.query + first * width_, dk);
      add_queries(scratch, n_padded, r_padded, dq + first * width_);
    }
  }

  // Asks for the stripe of the mask after that of key y, some rows with each key: rows are far apart, and no
  // hardware sees what is next.
  void expect_mask(int64_t batch, int64_t h, int64_t first, int64_t key, int64_t n, int64_t y) {
    const int64_t next = y / kStripe * kStripe + kStripe, share = ceil_div(p_.block_rows, kStripe);
    const int64_t begin = first + (next < n ? 0 : p_.block_rows) + y % kStripe * share;
    p_.mask.expect(batch, h, begin, std::min(begin + share, p_.L), key + (next < n ? next : 0));
  }

  // One key of a block: raw products to P and dS.
  void step(Scratch& scratch, const Head& head, int64_t first, int64_t r, int64_t key, int64_t y) {
    const int64_t ld = padded(r);
    C *weights = scratch.weights + y * ld, *grad_scores = scratch.grad_scores + y * ld;
    const Range seen = p_.rows_of(key + y).within({first, first + r});
    const int64_t begin = seen.begin - first, end = seen.end - first, count = end - begin;
    for (C* x : {weights, grad_scores}) {
      std::memset(static_cast<void*>(x), 0, begin * sizeof(C));
      std::memset(static_cast<void*>(x + end), 0, (ld - end) * sizeof(C));
    }
    if (seen.empty()) return;
    float *scores = scratch.scores + y * ld + begin, *grad_weights = scratch.grad_weights + y * ld + begin;
    const float* delta = head.delta + seen.begin;
    p_.make_natural(scores, count, scratch.slope);
    if (p_.dropout) {
      keep_bits(head.low + seen.begin, head.high + seen.begin, count, key + y, p_.threshold, scratch.kept);
      drop_rows(grad_weights, count, scratch.kept.data(), p_.keep_scale);
    }
    if (p_.softcap > 0.f) {
      through_softcap(grad_weights, delta, scratch.slope, count);
      delta = scratch.zeros;
    }
    const Bias bias = p_.bias(p_.mask.defined() ? scratch.mask + y % kStripe * ld : nullptr, begin);
    softmax_grad(scores, bias, grad_weights, head.logsumexp + seen.begin, delta, count, p_.unit_log2(),
                 weights + begin, grad_scores + begin);
    if (p_.dropout) drop_rows(weights + begin, count, scratch.kept.data());
  }

  // dK or dV (n, width) += A B, A (n, r) a block and B the rows of Q or dO.
  void add_keys(const C* A, int64_t n, int64_t r, Rows<const T> rows, int64_t width, const C* packed,
                float* out) {
    if constexpr (kRows)
      if (!packs_) return gemm_rows(n, width, r, A, padded(r), rows.data, rows.stride, out, true);
    gemm<C>(n, width, padded(r), A, packed, out, true);
  }

  void add_queries(Scratch& scratch, int64_t n_padded, int64_t r_padded, float* dq) {
    const C *keys = scratch.key_t, *grad_scores = scratch.grad_scores;
    if constexpr (kRows)
      if (!packs_)
        return gemm_rows(width_, r_padded, n_padded, keys, n_padded, grad_scores, r_padded, dq, true);
    pack({grad_scores, r_padded}, n_padded, r_padded, scratch.grad_packed);
    gemm<C>(width_, r_padded, n_padded, keys, scratch.grad_packed, dq, true);
  }

  void store_keys(int64_t batch, int64_t kv_head, int64_t j, const float* dk, const float* dv) {
    const int64_t first = j * p_.block_keys, n = std::min(p_.block_keys, p_.S - first);
    const Rows<T> to_k = head_rows<T>(t_.dk, batch, kv_head).from(first);
    const Rows<T> to_v = head_rows<T>(t_.dv, batch, kv_head).from(first);
    for (int64_t y = 0; y < n; ++y) {
      scale_row(dk + y * width_, p_.D, p_.scale, to_k[y]);
      scale_row(dv + y * width_v_, p_.Dv, p_.keep_scale, to_v[y]);
    }
  }

  // dQ of a block of rows = scale * the sum over shares of (dQ^T)^T.
  void finish_queries(float* stripe, int64_t head, int64_t i, const float* dq, int64_t shares) {
    const int64_t first = i * p_.block_rows, n = std::min(p_.block_rows, p_.L - first), ld = padded(n);
    const Rows<T> to = head_rows<T>(t_.dq, head / p_.H, head % p_.H).from(first);
    for (int64_t row = 0; row < n; row += kStripe) {
      const int64_t rows = std::min(kStripe, n - row);
      std::fill_n(stripe, rows * width_, 0.f);
      for (int64_t share = 0; share < shares; ++share) {
        const float* from = dq + share * rows_ * width_ + first * width_ + row;
        for (int64_t x = 0; x < width_; ++x)
          for (int64_t y = 0; y < rows; ++y) stripe[y * width_ + x] += from[x * ld + y];
      }
      for (int64_t y = 0; y < rows; ++y) scale_row(stripe + y * width_, p_.D, p_.scale, to[row + y]);
    }
  }

  const Problem& p_;
  const Tensors& t_;
  int64_t width_, width_v_;
  int64_t rows_;             // of a head, padded to whole blocks
  int64_t shares_;           // of a KV head's key blocks
  int64_t block_;            // elements
  bool packs_;               // whether B operands are packed
  Heads shared_heads_;       // all of them, where there are shares
  Buffer<float> shared_dq_;  // dQ^T: (B, H, shares, row blocks, width, block rows)
};

// Where scores are large, finfo.min for one, rounding takes log(n) from the
// logsumexp and P sums to n. All gradients are linear in those of out and
// logsumexp, so these are divided by the sums. Undefined if no row needs it.
Tensor lost_factors(const Tensor& q, const Tensor& k, const Tensor& logsumexp, const Problem& problem) {
  constexpr float kLarge = 1e4f;  // whose float32 neighbours are 1e-3 apart
  const Tensor row = logsumexp.contiguous();
  const float* x = row.const_data_ptr<float>();  // a loop, since small calls feel what ATen's ops cost
  const auto is_large = [&](float sum) { return std::abs(sum) > kLarge && std::abs(sum) < kInfinity; };
  if (std::none_of(x, x + row.numel(), is_large)) return Tensor();
  const Tensor large = (logsumexp.abs() > kLarge).logical_and_(logsumexp.isfinite());
  return weight_sums(q, k, logsumexp, problem.params, problem.natural ? 1.0 : problem.params.scale)
      .reciprocal_()
      .masked_fill_(large.logical_not(), 1.0);
}

}  // namespace

Backward blocked_backward(const Tensor& grad_out_, const Tensor& grad_logsumexp_, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                          const AttentionParams& params) {
  Tensor grad_out = grad_out_, grad_logsumexp = grad_logsumexp_;
  const Problem problem(q, k, v, params);
  if (const Tensor factors = lost_factors(q, k, logsumexp, problem); factors.defined()) {
    grad_out = (grad_out * factors.unsqueeze(-1)).to(grad_out.scalar_type());
    if (grad_logsumexp.defined()) grad_logsumexp = grad_logsumexp * factors;
  }
  const auto [B, H, K, L, S] = std::tie(problem.B, problem.H, problem.K, problem.L, problem.S);
  Tensor dq = empty_rows(q, B, H, L, problem.D);
  Tensor dk = empty_rows(k, B, K, S, problem.D), dv = empty_rows(v, B, K, S, problem.Dv);
  if (B == 0 || H == 0 || L == 0 || S == 0) return {dq.zero_(), dk.zero_(), dv.zero_(), Tensor()};
  const Tensor q_rows = with_rows(q), k_rows = with_rows(k), v_rows = with_rows(v), out_rows = with_rows(out),
               grad_rows = with_rows(grad_out), logsumexp_row = logsumexp.contiguous(),
               grad_logsumexp_row = grad_logsumexp.defined() ? grad_logsumexp.contiguous() : grad_logsumexp;
  const Tensors tensors{grad_rows, grad_logsumexp_row, q_rows, k_rows, v_rows,
                        out_rows,  logsumexp_row,      dq,     dk,     dv};
  by_type(q.scalar_type(), CpuLevel::avx512_bf16, [&](auto element, auto packed) {
    BackwardPass<decltype(element), decltype(packed)>(problem, tensors).run();
  });
  return {dq, dk, dv, Tensor()};
}

}  // namespace two_level_mha
