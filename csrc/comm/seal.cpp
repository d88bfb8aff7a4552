#include "seal.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "../base/arithmetic.h"
#include "../plan/traffic.h"

namespace two_level_mha {

namespace {

constexpr int64_t kLanes = 8;  // pairs of sums that a loop keeps apart
constexpr int64_t kBytesATask = 1 << 18;

uint64_t scrambled(uint64_t x) {
  x *= 0x9e3779b97f4a7c15;
  return x ^ (x >> 32);
}

// Of every lane the sum of its words and the sum of those sums: a changed bit shows, and so do swapped words.
uint64_t sum_of_words(const char* bytes, int64_t count) {
  std::array<uint64_t, kLanes> words, sums{}, sums_of_sums{};
  const int64_t whole = count - count % int64_t(sizeof words);
  int64_t at = 0;
  for (; at < whole; at += sizeof words) {
    std::memcpy(words.data(), bytes + at, sizeof words);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += words[lane] ^ (words[lane] >> 29);
      sums_of_sums[lane] += sums[lane];
    }
  }
  uint64_t state = count;
  for (int64_t lane = 0; lane < kLanes; ++lane)
    state = scrambled(scrambled(state ^ sums[lane]) ^ sums_of_sums[lane]);
  for (; at < count; ++at) state = scrambled(state ^ uint8_t(bytes[at]));
  return state;
}

}  // namespace

void Hash::add(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  mix(bits);
}

void Hash::add(const std::string& text) {
  mix(text.size());
  mix(sum_of_words(text.data(), text.size()));
}

void Hash::add(const Tensor& x) {
  add(x.scalar_type());
  add(x.requires_grad());
  Tensor once = x.detach();
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    add(x.size(dim));
    if (x.stride(dim) == 0 && x.size(dim) > 1) once = once.narrow(dim, 0, 1);
  }
  once = once.contiguous();
  const auto* bytes = static_cast<const char*>(once.const_data_ptr());
  const int64_t count = once.nbytes(), tasks = ceil_div(count, kBytesATask);
  std::vector<uint64_t> sums(tasks);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task * kBytesATask;
      sums[task] = sum_of_words(bytes + at, std::min(kBytesATask, count - at));
    }
  });
  for (uint64_t sum : sums) mix(sum);
}

Tensor seal_digits(int64_t seal, const Tensor& x, int64_t ranks) {
  const SealCode code = seal_code(x.element_size(), ranks);
  Tensor digits = at::empty({code.elements()}, at::kDouble);
  double* to = digits.mutable_data_ptr<double>();
  for (int64_t i = 0; i < code.digits(); ++i) {
    const auto digit = double((seal >> (i * code.bits)) & ((int64_t(1) << code.bits) - 1));
    to[2 * i] = digit;
    to[2 * i + 1] = code.complement ? 1 - digit : digit * digit;
  }
  return digits.to(x.scalar_type());
}

void check_seal(const Tensor& sums, int64_t ranks) {
  const SealCode code = seal_code(sums.element_size(), ranks);
  const Tensor exact = sums.to(at::kDouble).contiguous();
  const double* sum = exact.const_data_ptr<double>();
  bool alike = true;
  for (int64_t i = 0; i < code.digits(); ++i) {
    const double first = sum[2 * i], second = sum[2 * i + 1];
    // Cauchy and Schwarz: equal only where all digits are
    alike &= code.complement ? first == 0 || second == 0 : double(ranks) * second == first * first;
  }
  TORCH_CHECK_WITH(DistError, alike,
                   "the ranks of the grid are not in the same call of one layer with the same inputs");
}

Tensor with_seal(const Tensor& x, const Tensor& digits) {
  return at::cat({x.reshape(-1), digits});
}

}  // namespace two_level_mha
