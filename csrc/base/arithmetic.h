// Integer arithmetic shared by tables, passes and kernels; I is int64_t or c10::SymInt. No torch.
#pragma once

#include <cstdint>

namespace two_level_mha {

template <class I>
I ceil_div(I a, int64_t b) {
  return (a + (b - 1)) / b;
}

// Towards minus infinity; b > 0.
constexpr int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

}  // namespace two_level_mha
