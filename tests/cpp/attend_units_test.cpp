// Runs the units of csrc/attend/merge_units.h and dropout_units.h, which are what the CUDA kernels run, on
// the host with 32- and 64-bit indices, against merge.h's and dropout.h's contracts written down plainly. A
// failure localises index arithmetic, the width of a unit, or a write beyond the result.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/attend/dropout_units.h"
#include "../../csrc/attend/merge_units.h"
#include "expect.h"

using namespace two_level_mha;

namespace {

constexpr int kGuard = 64;  // elements before and behind a result, which stay as they are

struct Case {
  std::mt19937 random;
  int seed;
  bool wide;  // 64-bit indices

  explicit Case(int n) : random(n), seed(n), wide(n % 2) {}
  int64_t pick(int64_t low, int64_t high) { return low + (int64_t)(random() % (high - low + 1)); }
  void expect(bool right, const char* what) const { ::expect(right, what, seed); }
  template <typename Work>
  void run(const Work& work, int64_t units) const {
    for (int64_t i = 0; i < units; ++i) wide ? work(i) : work((uint32_t)i);
  }
};

template <typename Element>
void expect_guards(const Case& c, const std::vector<Element>& x, int64_t n, Element guard, const char* what) {
  for (int64_t i = 0; i < kGuard; ++i) c.expect(x[i] == guard && x[kGuard + n + i] == guard, what);
}

// Returns how many elements a unit had.
template <typename Scalar>
int64_t merge_case(int seed, double tolerance) {
  using Real = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;
  Case c(seed);
  const int64_t parts = c.pick(1, 5), rows = c.pick(1, 7);
  const int64_t width = c.pick(0, 1) ? c.pick(1, 4) * (16 / (int64_t)sizeof(Scalar)) : c.pick(1, 19);
  const int64_t skew = c.pick(0, 3) == 0;  // outs that begin off 16 bytes
  std::vector<Scalar> outs(parts * rows * width + skew), out(rows * width + 2 * kGuard, Scalar(-7.f));
  std::vector<Real> lses(parts * rows), lse(rows + 2 * kGuard, -7);
  std::uniform_real_distribution<float> uniform(-3, 3);
  for (Scalar& x : outs) x = Scalar(uniform(c.random));
  for (Real& x : lses) x = c.pick(0, 3) ? (Real)uniform(c.random) : -(Real)INFINITY;
  const MergeParams params{
      outs.data() + skew, lses.data(), out.data() + kGuard, lse.data() + kGuard, parts, rows, width};
  int64_t per_unit = 0;
  with_merge_units<Scalar>(params, [&](const auto& work, int64_t units) {
    per_unit = rows * width / units;
    c.run(work, units);
  });
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t p = 0; p < parts; ++p) sum += std::exp((double)lses[p * rows + row]);
    const double whole = std::log(sum);
    const Real got = lse[kGuard + row];
    c.expect(sum == 0 ? got == -(Real)INFINITY : std::abs(got - whole) < 1e-5, "merged logsumexp");
    for (int64_t d = 0; d < width; ++d) {
      double want = 0;
      for (int64_t p = 0; p < parts && sum > 0; ++p)
        want +=
            std::exp(lses[p * rows + row] - whole) * (double)(float)outs[skew + (p * rows + row) * width + d];
      c.expect(std::abs((double)(float)out[kGuard + row * width + d] - want) < tolerance, "merged out");
    }
  }
  expect_guards(c, out, rows * width, Scalar(-7.f), "memory beside out");
  expect_guards(c, lse, rows, (Real)-7, "memory beside logsumexp");
  return per_unit;
}

bool dropout_case(int seed) {
  Case c(seed);
  const int64_t batches = c.pick(1, 3), heads = c.pick(1, 4), rows = c.pick(1, 5);
  const int64_t columns = c.pick(0, 1) ? 16 * c.pick(1, 3) : c.pick(1, 50),
                n = batches * heads * rows * columns;
  const int64_t key = (int64_t)c.random() << 32 | c.random();
  alignas(16) static bool memory[2 * kGuard + 3 * 4 * 5 * 50];
  for (bool& x : memory) x = true;
  const DropoutMaskWork work{{&key,
                              memory + kGuard,
                              batches,
                              heads,
                              rows,
                              columns,
                              {c.pick(0, 9), c.pick(0, 9), c.pick(0, 1 << 20)},
                              dropout_threshold(0.4)}};
  for (int64_t i = 0; i < n; ++i) memory[kGuard + i] = false;
  c.run(work, work.units());
  int64_t at = kGuard;
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t l = 0; l < rows; ++l) {
        const int64_t* origin = work.params.origin;
        const DropoutRow row = dropout_row(key, origin[0] + b, origin[1] + h, origin[2] + l);
        for (int64_t s = 0; s < columns; ++s)
          c.expect(memory[at++] == dropout_keep(row, (uint32_t)s, work.params.threshold), "dropout mask");
      }
  for (int64_t i = 0; i < kGuard; ++i)
    c.expect(memory[i] && memory[kGuard + n + i], "memory beside the dropout mask");
  return columns % 16 == 0;
}

}  // namespace

int main() {
  int64_t vectors = 0, scalars = 0, whole = 0;
  auto count = [&](int64_t per_unit) { per_unit > 1 ? ++vectors : ++scalars; };
  for (int seed = 0; seed < 3000; ++seed) {
    count(merge_case<double>(seed, 1e-6));
    count(merge_case<float>(seed, 1e-5));
    count(merge_case<c10::Half>(seed, 4e-3));
    count(merge_case<c10::BFloat16>(seed, 3e-2));
    whole += dropout_case(seed);
  }
  std::printf(
      "12000 merges and 3000 dropout masks right; by vectors, by scalars: %ld, %ld; whole runs: %ld\n",
      long(vectors), long(scalars), long(whole));
  return vectors > 0 && scalars > 0 && whole > 0 && whole < 3000 ? 0 : 1;
}
