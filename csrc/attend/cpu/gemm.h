// What the CPU kernels multiply with: oneDNN's brgemm on rows and panels (panels.h).
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "brgemm.h"
#include "level.h"
#include "panels.h"

namespace two_level_mha {

// C (M, N) (+)= A (M, K) B with rows of A ld_a apart and B in panels. C has N columns.
template <class C>
void gemm(int64_t M, int64_t N, int64_t K, const C* A, int64_t ld_a, const C* B, float* out, bool add) {
  const int64_t columns = panel<C>();
  for (int64_t column = 0; column < N; column += columns) {
    const int64_t width = std::min(columns, N - column);
    brgemm(M, width, K, ld_a, width, N, add, A, B + column * K, out + column);
  }
}

template <class C>
void gemm(int64_t M, int64_t N, int64_t K, const C* A, const C* B, float* out, bool add) {
  gemm(M, N, K, A, K, B, out, add);
}

// The same with B as plain rows of float, ld_b apart.
inline void gemm_rows(int64_t M, int64_t N, int64_t K, const float* A, int64_t ld_a, const float* B,
                      int64_t ld_b, float* out, bool add) {
  const int64_t columns = panel<float>();
  for (int64_t column = 0; column < N; column += columns)
    brgemm(M, std::min(columns, N - column), K, ld_a, ld_b, N, add, A, B + column, out + column);
}

// Calls run(T, C): T is the element type of the tensors, C what the gemms read. The CPU multiplies float16 as
// float32, and so bfloat16 below `pairs`, the level from which its own products are the faster ones.
template <class Run>
auto by_type(at::ScalarType type, CpuLevel pairs, const Run& run) {
  if (type == at::kFloat) return run(float{}, float{});
  if (type == at::kHalf) return run(c10::Half{}, float{});
  if (cpu_level() >= pairs) return run(c10::BFloat16{}, c10::BFloat16{});
  return run(c10::BFloat16{}, float{});
}

}  // namespace two_level_mha
