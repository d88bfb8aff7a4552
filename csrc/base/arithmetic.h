// Integer arithmetic shared by tables, passes and kernels; I is int64_t or c10::SymInt. No torch.
#pragma once

#include <cstdint>

namespace two_level_mha {

template <class I>
I ceil_div(I a, int64_t b) {
  return (a + (b - 1)) / b;
}

}  // namespace two_level_mha
