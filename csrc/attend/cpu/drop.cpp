#include "drop.h"

#include "../dropout.h"
#include "clones.h"

namespace two_level_mha {

using c10::BFloat16;

TLM_CLONES void drop_columns(float* x, int64_t n, uint32_t low, uint32_t high, uint32_t column,
                             uint32_t threshold) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    x[i] = dropout_keep({low, high}, column + static_cast<uint32_t>(i), threshold) ? x[i] : 0.f;
}

TLM_CLONES void drop_columns(BFloat16* x, int64_t n, uint32_t low, uint32_t high, uint32_t column,
                             uint32_t threshold) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    bits[i] &= dropout_keep({low, high}, column + static_cast<uint32_t>(i), threshold) ? 0xffff : 0;
}

TLM_CLONES void keep_bits(const uint32_t* low, const uint32_t* high, int64_t n, uint32_t column,
                          uint32_t threshold, uint32_t* bits) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bits[i] = dropout_keep({low[i], high[i]}, column, threshold) ? ~0u : 0u;
}

TLM_CLONES void drop_rows(float* x, int64_t n, const uint32_t* bits, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = bits[i] ? x[i] * factor : 0.f;
}

TLM_CLONES void drop_rows(BFloat16* x, int64_t n, const uint32_t* bits) {
  uint16_t* half = reinterpret_cast<uint16_t*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) half[i] &= static_cast<uint16_t>(bits[i]);
}

}  // namespace two_level_mha
