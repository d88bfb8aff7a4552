// Rows and panels that a gemm reads (gemm.h): A as rows, B as panels of 64 or 32 columns, each K x 64 or K x 32
// and contiguous; bfloat16 panels interleave pairs of rows, which is what the dot-product instructions read.
// Blocks are padded with zeros to a multiple of kPad rows, and rows of bfloat16 to an even width, so that no
// product has a tail of its own.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

#include "../../base/arithmetic.h"
#include "buffer.h"
#include "level.h"

namespace two_level_mha {

// Columns of a panel: with AVX2 64 would be read from L2.
template <class C>
int64_t panel() {
  return std::is_same_v<C, float> && cpu_level() == CpuLevel::avx2 ? 32 : 64;
}

constexpr int64_t kPad = 32;

inline int64_t padded(int64_t rows) {
  return ceil_div(rows, kPad) * kPad;
}

// Width of a packed row of `width` elements.
template <class C>
int64_t packed_width(int64_t width) {
  return std::is_same_v<C, c10::BFloat16> ? (width + 1) / 2 * 2 : width;
}

// n rows of T as C, contiguous, padded with zeros to n_padded rows of packed_width.
template <class T, class C>
void copy_rows(Rows<const T> x, int64_t n, int64_t n_padded, int64_t width, C* out);

// The same rows, in place where they need neither another type nor padding.
template <class T, class C>
Rows<const C> rows_as(Rows<const T> x, int64_t n, int64_t n_padded, int64_t width, C* scratch) {
  const int64_t wide = packed_width<C>(width);
  if constexpr (std::is_same_v<T, C>)
    if (n == n_padded && width == wide) return x;
  copy_rows(x, n, n_padded, width, scratch);
  return {scratch, wide};
}

// x (n, width) contiguous, width already packed: panels of B = x^T, whose columns n .. n_padded are 0.
void pack_transposed(const float* x, int64_t n, int64_t n_padded, int64_t width, float* out);
void pack_transposed(const c10::BFloat16* x, int64_t n, int64_t n_padded, int64_t width, c10::BFloat16* out);

// x (n, width): panels of B = x, n even for bfloat16.
void pack(Rows<const float> x, int64_t n, int64_t width, float* out);
void pack(Rows<const c10::BFloat16> x, int64_t n, int64_t width, c10::BFloat16* out);

// x (n, width) contiguous to out (width, n).
void transpose(const float* x, int64_t n, int64_t width, float* out);
void transpose(const c10::BFloat16* x, int64_t n, int64_t width, c10::BFloat16* out);

}  // namespace two_level_mha
