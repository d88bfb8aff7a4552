// A 16 x 16 transpose in registers, for whoever moves 32-bit words across. No torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../base/host_device.h"

namespace two_level_mha {

constexpr int64_t kTile = 16;  // words of a cache line

typedef float Line __attribute__((vector_size(64)));  // holds any words: they are only moved

// Four perfect shuffles of 16 lines are a transpose.
TLM_HOST_DEVICE void transpose_tile(Line (&lines)[kTile]) {
  Line other[kTile];
  for (int stage = 0; stage < 4; ++stage) {
    const Line* from = stage % 2 ? other : lines;
    Line* to = stage % 2 ? lines : other;
    for (int64_t i = 0; i < kTile / 2; ++i) {
      const Line a = from[i], b = from[i + kTile / 2];
      to[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] =
          __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }
}

// out[c * ld_out + r] = x[r * ld + c] for words x (n, width)
TLM_HOST_DEVICE void transpose_words(const uint32_t* x, int64_t ld, int64_t n, int64_t width, uint32_t* out,
                                     int64_t ld_out) {
  const int64_t whole_n = n / kTile * kTile, whole_width = width / kTile * kTile;
  for (int64_t c = 0; c < whole_width; c += kTile)
    for (int64_t r = 0; r < whole_n; r += kTile) {
      Line lines[kTile];
      for (int64_t i = 0; i < kTile; ++i) std::memcpy(&lines[i], x + (r + i) * ld + c, sizeof(Line));
      transpose_tile(lines);
      for (int64_t i = 0; i < kTile; ++i) std::memcpy(out + (c + i) * ld_out + r, &lines[i], sizeof(Line));
    }
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = r < whole_n ? whole_width : 0; c < width; ++c) out[c * ld_out + r] = x[r * ld + c];
}

}  // namespace two_level_mha
