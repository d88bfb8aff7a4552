// Scores in blocks of rows through ATen ops, any device, dtype and feature, never L x S at once: for the
// chunked kernel, and for what others ask of scores besides.
#pragma once

#include <utility>

#include "contract.h"

namespace two_level_mha {

// How half precision goes into products, whose sums are float32 either way: widened to float32, or as it is, by
// at::bmm with an out_dtype, which is for tensor cores: torch has it on CUDA alone.
enum class Halves : bool { widened, as_they_are };

// (B, K, G, rows, n) times (B, K, 1, n, m): (B, K, G, rows, m). Half keys take the rows of a group as rows of one
// matrix, rounded to their dtype, and give float32.
Tensor times_keys(const Tensor& rows, const Tensor& keys);

// The sum over the rows of a group of a^T b, (B, K, G, rows, n) and (B, K, G, rows, m): (B, K, 1, n, m), likewise
// where b is half.
Tensor over_rows(const Tensor& a, const Tensor& b);

// Everything of a call that does not depend on the block.
struct Scores {
  const AttentionParams& params;
  Halves halves;
  Tensor q, k;  // (B, K, G, L, D), (B, K, 1, S, D)
  int64_t B, H, K, L, S;
  int64_t block;  // rows at a time

  Scores(const Tensor& q, const Tensor& k, const AttentionParams& params, Halves halves = Halves::widened);

  static Tensor wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }
  // The dtype of scores and of all sums.
  at::ScalarType sums() const { return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  // What products take of x.
  Tensor operand(const Tensor& x) const { return halves == Halves::widened ? wide(x) : x; }
  // (B, K, S, D) to (B, K, 1, S, D), copied where B and K cannot be one dim to times_keys.
  Tensor operand_of_keys(const Tensor& x) const;
  // (B, H, ..) to (B, K, G, ..)
  Tensor grouped(const Tensor& x) const { return x.unflatten(1, {K, H / K}); }
};

// One block of rows against the keys it can see.
struct ScoreBlock {
  const Scores& all;
  int64_t row, rows, key, keys;

  ScoreBlock(const Scores& all, int64_t first);

  Tensor of_rows(const Tensor& x) const { return x.narrow(-2, row, rows); }
  Tensor of_keys(const Tensor& x) const { return x.narrow(-2, key, keys); }
  Tensor q() const { return of_rows(all.q); }
  Tensor k() const { return of_keys(all.k); }

  // Scores before the mask, (B, K, G, rows, keys), and tanh(x / c) where there is a soft cap.
  std::pair<Tensor, Tensor> raw() const;
  // The same with the mask, causal and window.
  Tensor masked(Tensor scores) const;
  // A mask's part for this block, or a dmask's, (b, h, rows, keys) or broadcast.
  Tensor of_block(Tensor mask) const;
  // (b, h, ..) or (b, 1, ..) to (b, K, G, ..) or (b, 1, 1, ..)
  Tensor group_heads(const Tensor& mask) const;
};

// The sum of exp(score - logsumexp) over the keys of each row (B, H, L): 1, but for what rounding took from
// logsumexp; NaN for a row that sees no key. Rounded as a kernel does that keeps scores in units of `unit`.
Tensor weight_sums(const Tensor& q, const Tensor& k, const Tensor& logsumexp, const AttentionParams& params,
                   double unit);

}  // namespace two_level_mha
