// One row of merge.h, the same for the CPU and the CUDA version. No torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "../base/host_device.h"

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

}  // namespace two_level_mha
