// Runs csrc/head/head_units.h, which is what the CUDA kernel of norm_rotary runs, on the host, lane by lane, against the
// formulas in double. A failure localises strides, which columns a lane has, pairs, the norm, or a write beyond a vector.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/head/head_units.h"
#include "expect.h"

using namespace two_level_mha;

namespace {

template <typename Scalar, typename Angle>
void one_case(int seed, double tolerance) {
  std::mt19937 random(seed);
  auto pick = [&](int64_t low, int64_t high) { return low + (int64_t)(random() % (high - low + 1)); };
  auto fill = [&](auto& xs) {
    for (auto& x : xs) x = (float)pick(-999, 999) / 256;
  };
  HeadWork<Scalar, Angle> work{};
  work.d = pick(1, 80), work.r = pick(0, 1) ? 2 * pick(0, work.d / 2) : 0;
  work.eps = 1e-5, work.interleaved = pick(0, 1);
  const bool norms = pick(0, 1);
  const int64_t B = pick(1, 3);
  std::vector<Scalar> x[2], y[2], weight[2];
  std::vector<Angle> cos[2], sin[2];
  for (int i = 0; i < 2; ++i) {
    auto& side = work.sides[i];
    side.heads = pick(1, 4), side.L = pick(0, 5), side.rows = B * side.heads * side.L;
    const int64_t gap = pick(0, 3), one = pick(0, 1);  // angles of one sequence for all
    side.stride[1] = work.d + gap,
    side.stride[2] = side.heads * side.stride[1];  // as a projection leaves them
    side.stride[0] = side.L * side.stride[2];
    x[i].resize(B * side.stride[0]), y[i].assign(side.rows * work.d + 8, Scalar(-7.f)),
        weight[i].resize(work.d);
    cos[i].resize((one ? 1 : B) * side.L * (work.r + gap)), sin[i].resize(cos[i].size());
    fill(x[i]), fill(weight[i]), fill(cos[i]), fill(sin[i]);
    side.x = x[i].data(), side.y = y[i].data(), side.weight = norms ? weight[i].data() : nullptr;
    side.cos = cos[i].data(), side.sin = sin[i].data();
    side.cos_stride[1] = side.sin_stride[1] = work.r + gap;
    side.cos_stride[0] = side.sin_stride[0] = one ? 0 : side.L * (work.r + gap);
  }
  for (int64_t i = 0; i < work.rows(); ++i) {
    const auto row = work.row(i);
    double squares = 0;
    for (int lane = 0; lane < kHeadLanes; ++lane) squares += work.squares(row, lane);
    for (int lane = kHeadLanes - 1; lane >= 0; --lane) work.write(row, lane, work.scale(squares));
  }
  for (int i = 0; i < 2; ++i) {
    const auto& side = work.sides[i];
    int64_t at = 0;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t head = 0; head < side.heads; ++head)
        for (int64_t l = 0; l < side.L; ++l) {
          const Scalar* from = &x[i][b * side.stride[0] + head * side.stride[1] + l * side.stride[2]];
          std::vector<double> n(work.d);
          double mean = 0;
          for (int64_t c = 0; c < work.d; ++c) mean += (double)from[c] * (double)from[c] / work.d;
          for (int64_t c = 0; c < work.d; ++c)
            n[c] = norms ? (double)(Scalar)((double)from[c] / std::sqrt(mean + 1e-5) * (double)weight[i][c])
                         : (double)from[c];
          for (int64_t c = 0; c < work.d; ++c) {
            double want = n[c];
            if (c < work.r) {
              const bool first = work.interleaved ? c % 2 == 0 : c < work.r / 2;
              const int64_t apart = work.interleaved ? 1 : work.r / 2;
              const int64_t angle = b * side.cos_stride[0] + l * side.cos_stride[1] + c;
              want = n[c] * (double)cos[i][angle] +
                     (first ? -n[c + apart] : n[c - apart]) * (double)sin[i][angle];
            }
            expect(std::abs((double)y[i][at++] - want) <= tolerance * (1 + std::abs(want)), "y", seed);
          }
        }
    for (int64_t c = 0; c < 8; ++c) expect(y[i][at + c] == Scalar(-7.f), "memory beside y", seed);
  }
}

}  // namespace

int main() {
  for (int seed = 0; seed < 3000; ++seed) {
    one_case<double, double>(seed, 1e-12);
    one_case<float, float>(seed, 1e-4);
    one_case<c10::Half, float>(seed, 1e-2);
    one_case<c10::Half, c10::Half>(seed, 1e-2);
    one_case<c10::BFloat16, float>(seed, 8e-2);
    one_case<c10::BFloat16, c10::BFloat16>(seed, 8e-2);
  }
  std::printf("18000 norms and turns right\n");
  return 0;
}
