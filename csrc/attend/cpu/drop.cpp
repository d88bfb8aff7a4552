#include "drop.h"

#include "../dropout.h"
#include "vectorised.h"

namespace two_level_mha {

using c10::BFloat16;

void drop_columns(float* x, int64_t n, uint32_t low, uint32_t high, uint32_t column, uint32_t threshold) {
  vectorised([=]() TLM_INLINE {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      x[i] = dropout_keep({low, high}, column + static_cast<uint32_t>(i), threshold) ? x[i] : 0.f;
  });
}

void drop_columns(BFloat16* x, int64_t n, uint32_t low, uint32_t high, uint32_t column, uint32_t threshold) {
  vectorised([=]() TLM_INLINE {
    uint16_t* bits = reinterpret_cast<uint16_t*>(x);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      bits[i] &= dropout_keep({low, high}, column + static_cast<uint32_t>(i), threshold) ? 0xffff : 0;
  });
}

void keep_bits(const uint32_t* low, const uint32_t* high, int64_t n, uint32_t column, uint32_t threshold,
               uint32_t* bits) {
  vectorised([=]() TLM_INLINE {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) bits[i] = dropout_keep({low[i], high[i]}, column, threshold) ? ~0u : 0u;
  });
}

void drop_rows(float* x, int64_t n, const uint32_t* bits, float factor) {
  vectorised([=]() TLM_INLINE {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = bits[i] ? x[i] * factor : 0.f;
  });
}

void drop_rows(BFloat16* x, int64_t n, const uint32_t* bits) {
  vectorised([=]() TLM_INLINE {
    uint16_t* half = reinterpret_cast<uint16_t*>(x);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] &= static_cast<uint16_t>(bits[i]);
  });
}

}  // namespace two_level_mha
