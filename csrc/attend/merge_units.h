// merge.h as independent units of work: what the CUDA kernel runs, one unit a thread and step, and what tests
// run on the host; a row's logsumexp and weights, which the CPU version shares. No torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../base/host_device.h"
#include "../base/vector.h"

namespace two_level_mha {

// log(sum_p exp(lse[p * stride])); -inf if all are.
template <typename Real>
TLM_HOST_DEVICE Real merged_logsumexp(const Real* lse, int64_t parts, int64_t stride) {
  Real top = lse[0];
  for (int64_t p = 1; p < parts; p++) top = lse[p * stride] > top ? lse[p * stride] : top;
  if (top == -(Real)INFINITY) return top;
  Real sum = 0;
  for (int64_t p = 0; p < parts; p++) sum += std::exp(lse[p * stride] - top);
  return top + std::log(sum);
}

// Weight of a part; only asked for where the part's logsumexp is finite, and so the merged one.
template <typename Real>
TLM_HOST_DEVICE Real merge_weight(Real part, Real merged) {
  return std::exp(part - merged);
}

struct MergeParams {
  const void* outs;  // (parts, rows, width), contiguous
  const void* lses;  // (parts, rows)
  void* out;         // (rows, width)
  void* lse;         // (rows)
  int64_t parts, rows, width;
};

// One unit is N neighbouring columns of one row; whoever has a row's first columns writes its logsumexp. The
// few logsumexps of a row are read again by each of its units, from the cache.
template <typename Scalar, int N>
struct MergeWork {
  using Real = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;
  using Vec = Vector<Scalar, N>;
  MergeParams params;

  template <typename Index>
  TLM_HOST_DEVICE void operator()(Index unit) const {
    Index units = (Index)(params.width / N);
    int64_t row = unit / units, column = unit % units;
    const Real* lses = (const Real*)params.lses + row;
    const Real merged = merged_logsumexp(lses, params.parts, params.rows);
    if (column == 0) ((Real*)params.lse)[row] = merged;

    Real sum[N] = {};
    const Vec* part = (const Vec*)params.outs + row * units + column;
    for (int64_t p = 0; p < params.parts; p++, part += params.rows * units) {
      Real lse = lses[p * params.rows];
      if (lse == -(Real)INFINITY) continue;
      Real weight = merge_weight(lse, merged);
      Vec x = *part;
      for (int i = 0; i < N; i++) sum[i] += weight * (Real)x.x[i];
    }
    Vec y;
    for (int i = 0; i < N; i++) y.x[i] = (Scalar)sum[i];
    ((Vec*)params.out)[row * units + column] = y;
  }
};

// Calls run(work, number of units) with the widest units that the call's memory and width allow.
template <typename Scalar, typename Run>
auto with_merge_units(const MergeParams& params, const Run& run) {
  constexpr int N = 16 / sizeof(Scalar);
  const bool aligned = params.width % N == 0 && ((uintptr_t)params.outs | (uintptr_t)params.out) % 16 == 0;
  if (aligned) return run(MergeWork<Scalar, N>{params}, params.rows * (params.width / N));
  return run(MergeWork<Scalar, 1>{params}, params.rows * params.width);
}

}  // namespace two_level_mha
