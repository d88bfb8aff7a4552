#include "problem.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>

namespace two_level_mha {

namespace {

constexpr double kLeastUnit = 1e-30;  // by which a logsumexp can be divided without overflow

// Bytes of a core's second cache; 1 MB where the system does not say.
int64_t second_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return size;
#endif
  return int64_t(1) << 20;
}

}  // namespace

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
      natural(params.mask.defined() || params.softcap > 0.0 || params.scale < kLeastUnit),
      scale(params.scale),
      unit(natural ? 1.f : scale),
      softcap(params.softcap),
      mask(params.mask),
      seed(params.dropout_p > 0.0 ? params.seed.item<int64_t>() : 0),
      threshold(dropout_threshold(params.dropout_p)),
      keep_scale(params.dropout_p < 1.0 ? 1.0 / (1.0 - params.dropout_p) : 0.0),
      dropout(params.dropout_p > 0.0) {
  // Causal blocks are small, since a block on the diagonal is computed whole, and so are those of which 256 rows
  // would fill more than half of the second cache: a gemm reads them again for every panel. With fewer heads than
  // threads a head has at least a block for each thread it gets.
  static const int64_t cache = second_cache();
  const bool small = params.causal || 256 * std::max(D, Dv) * int64_t(sizeof(float)) > cache / 2;
  const int64_t largest = small ? 128 : 256, threads = at::get_num_threads();
  auto block = [&](int64_t length, int64_t heads) {
    const int64_t shares = ceil_div(threads, std::clamp<int64_t>(heads, 1, threads));
    return std::min(largest, padded(std::max<int64_t>(ceil_div(length, shares), 1)));
  };
  block_rows = block(L, B * H);
  block_keys = block(S, B * K);
}

}  // namespace two_level_mha
