// Counter-based dropout: whether element (batch, head, row, column) survives depends on the seed and on those
// four global indices alone, so that every grid, scheme, device and block order draws the same mask.
//
// A row is hashed once to 64 bits (splitmix64, Steele et al. 2014), an element costs one 32-bit finaliser
// ("lowbias32", C. Wellons 2018) of its column mixed with both halves of the row's hash.
#pragma once

#include <cstdint>

#include "../base/host_device.h"

namespace two_level_mha {

struct DropoutRow {
  uint32_t low, high;
};

TLM_HOST_DEVICE uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

TLM_HOST_DEVICE DropoutRow dropout_row(int64_t seed, int64_t batch, int64_t head, int64_t row) {
  uint64_t x = splitmix64((uint64_t)seed);
  x = splitmix64(x ^ (uint64_t)batch);
  x = splitmix64(x ^ (uint64_t)head);
  x = splitmix64(x ^ (uint64_t)row);
  return {(uint32_t)x, (uint32_t)(x >> 32)};
}

// An element is kept if its 32 bits are below this: 2^32 * (1 - p), p in (0, 1].
inline uint32_t dropout_threshold(double p) {
  double kept = 4294967296.0 * (1.0 - p);
  return kept >= 4294967295.0 ? 4294967295u : (uint32_t)kept;
}

TLM_HOST_DEVICE bool dropout_keep(DropoutRow row, uint32_t column, uint32_t threshold) {
  uint32_t x = column ^ row.low;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= row.high;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x < threshold;
}

}  // namespace two_level_mha
