// Integer arithmetic shared by tables, passes and kernels; I is int64_t or c10::SymInt. No torch.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

namespace two_level_mha {

template <class I>
I ceil_div(I a, int64_t b) {
  return (a + (b - 1)) / b;
}

// The value of an integer that is known while tracing; a guard on a symbolic one would cost a graph per side.
template <class I>
std::optional<int64_t> known(const I& x) {
  if constexpr (std::is_integral_v<I>)
    return x;
  else
    return x.maybe_as_int();
}

// Towards minus infinity; b > 0.
constexpr int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}

}  // namespace two_level_mha
