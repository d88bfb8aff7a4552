#include "panels.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

#include "store.h"
#include "transpose.h"
#include "vectorised.h"

namespace two_level_mha {

using c10::BFloat16;
using c10::Half;

namespace {

void transpose(const uint32_t* x, int64_t n, int64_t width, uint32_t* out, int64_t ld) {
  vectorised([=]() TLM_INLINE { transpose_words(x, width, n, width, out, ld); });
}

template <class T>
void convert(const T* x, int64_t n, float* out) {
  vectorised([=]() TLM_INLINE {
    for (int64_t i = 0; i < n; ++i) out[i] = load(x, i);
  });
}

void convert(const float* x, int64_t n, float* out) {
  std::memcpy(out, x, n * sizeof(float));
}

void convert(const BFloat16* x, int64_t n, BFloat16* out) {
  std::memcpy(static_cast<void*>(out), x, n * sizeof(BFloat16));
}

// A pair of bfloat16 travels as one word: a column of x^T is a row of words of x.
template <class C>
void pack_transposed_words(const C* x, int64_t n, int64_t n_padded, int64_t width, C* out) {
  const int64_t words = width * sizeof(C) / sizeof(uint32_t);
  if (n < n_padded) std::memset(static_cast<void*>(out), 0, n_padded * width * sizeof(C));
  const int64_t columns = panel<C>();
  for (int64_t c = 0; c < n; c += columns)
    transpose(reinterpret_cast<const uint32_t*>(x + c * width), std::min(columns, n - c), words,
              reinterpret_cast<uint32_t*>(out + c * width), std::min(columns, n_padded - c));
}

}  // namespace

template <class T, class C>
void copy_rows(Rows<const T> x, int64_t n, int64_t n_padded, int64_t width, C* out) {
  const int64_t wide = packed_width<C>(width);
  for (int64_t row = 0; row < n; ++row) {
    convert(x[row], width, out + row * wide);
    if (width < wide) out[row * wide + width] = C(0.f);
  }
  std::memset(static_cast<void*>(out + n * wide), 0, (n_padded - n) * wide * sizeof(C));
}

template void copy_rows<float, float>(Rows<const float>, int64_t, int64_t, int64_t, float*);
template void copy_rows<Half, float>(Rows<const Half>, int64_t, int64_t, int64_t, float*);
template void copy_rows<BFloat16, float>(Rows<const BFloat16>, int64_t, int64_t, int64_t, float*);
template void copy_rows<BFloat16, BFloat16>(Rows<const BFloat16>, int64_t, int64_t, int64_t, BFloat16*);

void pack_transposed(const float* x, int64_t n, int64_t n_padded, int64_t width, float* out) {
  pack_transposed_words(x, n, n_padded, width, out);
}

void pack_transposed(const BFloat16* x, int64_t n, int64_t n_padded, int64_t width, BFloat16* out) {
  pack_transposed_words(x, n, n_padded, width, out);
}

void pack(Rows<const float> x, int64_t n, int64_t width, float* out) {
  for (int64_t c = 0, step = panel<float>(); c < width; c += step) {
    const int64_t columns = std::min(step, width - c);
    for (int64_t row = 0; row < n; ++row)
      std::memcpy(out + c * n + row * columns, x[row] + c, columns * sizeof(float));
  }
}

void pack(Rows<const BFloat16> x, int64_t n, int64_t width, BFloat16* out) {
  vectorised([=]() TLM_INLINE {
    const int64_t step = panel<BFloat16>();
    for (int64_t row = 0; row < n; row += 2)
      for (int64_t c = 0; c < width; c += step) {
        const int64_t columns = std::min(step, width - c);
        const uint16_t* even = reinterpret_cast<const uint16_t*>(x[row] + c);
        const uint16_t* odd = reinterpret_cast<const uint16_t*>(x[row + 1] + c);
        uint32_t* words = reinterpret_cast<uint32_t*>(out + c * n + row * columns);
        for (int64_t i = 0; i < columns; ++i) words[i] = even[i] | (static_cast<uint32_t>(odd[i]) << 16);
      }
  });
}

void transpose(const float* x, int64_t n, int64_t width, float* out) {
  transpose(reinterpret_cast<const uint32_t*>(x), n, width, reinterpret_cast<uint32_t*>(out), n);
}

void transpose(const BFloat16* x, int64_t n, int64_t width, BFloat16* out) {
  vectorised([=]() TLM_INLINE {
    for (int64_t first = 0; first < width; first += kTile)
      for (int64_t r = 0; r < n; ++r)
        for (int64_t k = first; k < std::min(first + kTile, width); ++k) out[k * n + r] = x[r * width + k];
  });
}

}  // namespace two_level_mha
