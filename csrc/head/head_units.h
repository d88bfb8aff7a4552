// norm_rotary as units of work: what the CUDA kernel runs, a warp for each head's vector, and what tests run on the host.
// No torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../base/host_device.h"

namespace two_level_mha {

constexpr int kHeadLanes = 32;

// The vectors of q, or of k. Strides count elements; the last dim of everything is dense.
template <typename Scalar, typename Angle>
struct HeadSide {
  const Scalar* x;                       // (B, heads, L, d)
  Scalar* y;                             // the same, contiguous
  const Scalar* weight;                  // (d,), or null
  const Angle *cos, *sin;                // (B or 1, 1, L, r)
  int64_t stride[3];                     // of x, by b, head, l
  int64_t cos_stride[2], sin_stride[2];  // by b, l; 0 where one is for all
  int64_t heads, L, rows;                // rows = B heads L
};

template <typename Scalar, typename Angle>
struct HeadWork {
  using Real = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;
  HeadSide<Scalar, Angle> sides[2];  // q and k
  int64_t d, r;                      // r = 0: nothing is turned
  Real eps;
  bool interleaved;

  struct Row {
    const Scalar *x, *weight;
    Scalar* y;
    const Angle *cos, *sin;
  };

  TLM_HOST_DEVICE int64_t rows() const { return sides[0].rows + sides[1].rows; }

  TLM_HOST_DEVICE Row row(int64_t i) const {
    const HeadSide<Scalar, Angle>& side = sides[i >= sides[0].rows];
    if (i >= sides[0].rows) i -= sides[0].rows;
    const int64_t l = i % side.L, head = i / side.L % side.heads, b = i / side.L / side.heads;
    return {side.x + b * side.stride[0] + head * side.stride[1] + l * side.stride[2], side.weight,
            side.y + i * d, side.cos + b * side.cos_stride[0] + l * side.cos_stride[1],
            side.sin + b * side.sin_stride[0] + l * side.sin_stride[1]};
  }

  // This lane's part of the sum of squares.
  TLM_HOST_DEVICE Real squares(const Row& row, int lane) const {
    Real sum = 0;
    for (int64_t c = lane; c < d; c += kHeadLanes) sum += (Real)row.x[c] * (Real)row.x[c];
    return sum;
  }

  // What the vector is multiplied by, from the sum of all lanes' squares.
  TLM_HOST_DEVICE Real scale(Real squares) const { return 1 / std::sqrt(squares / (Real)d + eps); }

  // Writes this lane's columns.
  TLM_HOST_DEVICE void write(const Row& row, int lane, Real scale) const {
    for (int64_t pair = lane; pair < r / 2; pair += kHeadLanes) {
      const int64_t first = interleaved ? 2 * pair : pair, second = interleaved ? first + 1 : pair + r / 2;
      const Real a = normed(row, first, scale), b = normed(row, second, scale);
      row.y[first] = (Scalar)(a * (Real)row.cos[first] - b * (Real)row.sin[first]);
      row.y[second] = (Scalar)(b * (Real)row.cos[second] + a * (Real)row.sin[second]);
    }
    for (int64_t c = r + lane; c < d; c += kHeadLanes) row.y[c] = (Scalar)normed(row, c, scale);
  }

 private:
  // Rounded as the norm alone would be.
  TLM_HOST_DEVICE Real normed(const Row& row, int64_t c, Real scale) const {
    const Real x = row.x[c];
    return row.weight ? (Real)(Scalar)(x * scale * (Real)row.weight[c]) : x;
  }
};

}  // namespace two_level_mha
