// Runs csrc/comm/seal_units.h, which is what the CUDA kernels of a call's hash run, on the host: units in any order,
// 32- and 64-bit indices, tensors of any length and alignment, every dtype that digits ride in. A failure localises a
// byte that the hash does not see, a read beyond a tensor, digits that a sum does not keep, or a verdict on them.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/comm/seal_units.h"
#include "../../csrc/plan/traffic.h"
#include "expect.h"

using namespace two_level_mha;

namespace {

using Bytes = std::vector<char>;

// Each tensor in memory of its own that ends with it, `skew` bytes off a word.
uint64_t hash_of(const std::vector<Bytes>& tensors, int skew, bool wide, bool backwards, uint64_t start,
                 const uint64_t* before) {
  std::vector<std::unique_ptr<char[]>> memory;
  HashWork work{};
  work.start = start;
  work.before = before;
  for (const Bytes& x : tensors) {
    memory.emplace_back(new char[x.size() + skew]);
    std::copy(x.begin(), x.end(), memory.back().get() + skew);
    work.add(memory.back().get() + skew, int64_t(x.size()));
  }
  uint64_t sum = work.base();
  for (int64_t i = 0; i < work.units; ++i) {
    const int64_t unit = backwards ? work.units - 1 - i : i;
    sum += wide ? work(unit) : work(uint32_t(unit));
  }
  return sum;
}

void hash_case(int seed) {
  std::mt19937 random(seed);
  auto pick = [&](int low, int high) { return low + int(random() % (high - low + 1)); };
  std::vector<Bytes> tensors(pick(1, kMaxHashed));
  for (Bytes& x : tensors) {
    x.resize(pick(0, 40));
    for (char& c : x) c = char(random());
  }
  tensors[pick(0, int(tensors.size()) - 1)].resize(pick(9, 40), 'x');
  const uint64_t start = random(), before = random(), other = before + 1;
  auto hash = [&](const std::vector<Bytes>& xs) { return hash_of(xs, 0, false, false, start, &before); };
  const uint64_t whole = hash(tensors);
  for (int skew : {0, 1, 4, 8})
    for (bool wide : {false, true})
      expect(hash_of(tensors, skew, wide, skew > 0, start, &before) == whole, "order or alignment", seed);
  expect(hash_of(tensors, 0, false, false, start + 1, &before) != whole, "what is no tensor", seed);
  expect(hash_of(tensors, 0, false, false, start, &other) != whole, "the hash before", seed);
  expect(hash_of(tensors, 0, false, false, start, nullptr) != whole, "no hash before", seed);
  for (size_t i = 0; i < tensors.size(); ++i) {
    auto changed = tensors;
    if (changed[i].empty()) continue;
    const int at = pick(0, int(changed[i].size()) - 1);
    changed[i][at] ^= char(1 << pick(0, 7));
    const uint64_t low = (1 << SealCode::kBits) - 1;
    expect(((hash(changed) ^ whole) & low) != 0, "a bit",
           seed);  // one in a million may be equal: none of these
    if (changed[i].size() < 16 || !std::memcmp(&tensors[i][0], &tensors[i][8], 8)) continue;
    changed = tensors;
    std::swap_ranges(&changed[i][0], &changed[i][8], &changed[i][8]);
    expect(hash(changed) != whole, "swapped words", seed);
  }
}

// Returns whether the digits were bits and complements.
template <typename Scalar>
bool verdict_case(int seed) {
  std::mt19937 random(seed);
  const int64_t ranks = 1 + random() % 128;
  const SealCode code = seal_code(sizeof(Scalar), ranks);
  const uint64_t hash = (uint64_t(random()) << 32 | random()) & 0x7fffffffffffffff;
  const uint64_t other =
      random() % 2 ? hash ^ (uint64_t(1) << random() % SealCode::kBits) : uint64_t(random());
  const int64_t odd = random() % 3 ? random() % ranks : ranks;  // ranks: nobody
  std::vector<Scalar> sums(code.elements(), Scalar(0.f)), digits(code.elements());
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const uint64_t mine = rank == odd ? other : hash;
    const DigitsWork<Scalar> work{&mine, digits.data(), code.bits, code.complement};
    for (int64_t i = 0; i < code.digits(); ++i) seed % 2 ? work(i) : work(uint32_t(i));
    for (size_t i = 0; i < sums.size(); ++i)  // rounded after each step, as a sum in this dtype may be
      sums[i] = Scalar(SealReal<Scalar>(sums[i]) + SealReal<Scalar>(digits[i]));
  }
  const auto mine = int64_t(hash);
  int64_t verdict[2] = {0, 0};
  VerdictWork<Scalar>{sums.data(), &mine, verdict, ranks, code.digits(), code.complement}(0);
  const uint64_t seen = (uint64_t(1) << (code.digits() * code.bits)) - 1;
  const bool differs = odd < ranks && ranks > 1 && ((hash ^ other) & seen) != 0;
  expect(verdict[0] == differs && verdict[1] == mine, "verdict", seed);
  return code.complement;
}

}  // namespace

int main() {
  int64_t complements = 0;
  for (int seed = 0; seed < 3000; ++seed) {
    hash_case(seed);
    verdict_case<double>(seed), verdict_case<float>(seed), verdict_case<c10::Half>(seed);
    complements += verdict_case<c10::BFloat16>(seed);
  }
  std::printf("3000 hashes and 12000 verdicts right; by complements: %ld\n", long(complements));
  return complements > 0 && complements < 3000 ? 0 : 1;
}
