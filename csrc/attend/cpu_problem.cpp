#include "cpu_problem.h"

namespace two_level_mha {

Problem::Problem(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& p)
    : params(p),
      B(q.size(0)),
      H(q.size(1)),
      K(k.size(1)),
      group(H / K),
      L(q.size(2)),
      S(k.size(2)),
      D(q.size(3)),
      Dv(v.size(3)),
      natural(params.mask.defined() || params.softcap > 0.0 || params.scale <= 0.0),
      scale(params.scale),
      unit(natural ? 1.f : scale),
      softcap(params.softcap),
      mask(params.mask),
      seed(params.dropout_p > 0.0 ? params.seed.item<int64_t>() : 0),
      threshold(dropout_threshold(params.dropout_p)),
      keep_scale(params.dropout_p < 1.0 ? 1.0 / (1.0 - params.dropout_p) : 0.0),
      dropout(params.dropout_p > 0.0) {
  // Causal blocks are small, since a block on the diagonal is computed whole.
  block_rows = block_keys = params.causal ? 128 : 256;
  block_keys = std::min(block_keys, padded(std::max<int64_t>(S, 1)));
  block_rows = std::min(block_rows, padded(std::max<int64_t>(L, 1)));
}

}  // namespace two_level_mha
