// seal.h as units of work: what the CUDA kernels run, and what tests run on the host. The hash of a call's tensors is
// a sum over their words, so that threads may add in any order; digits and what sums of digits say, the CPU version
// shares. No torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../base/host_device.h"

namespace two_level_mha {

constexpr int kMaxHashed = 24;  // tensors in one launch: kernel arguments are at most 4 KB

// A word of a tensor as one number that all its bits and its place decide, the low bits of it too.
TLM_HOST_DEVICE uint64_t mixed_word(uint64_t word, uint64_t place) {
  word = (word ^ (place * 0x9e3779b97f4a7c15)) * 0xbf58476d1ce4e5b9;
  word = (word ^ (word >> 29)) * 0x94d049bb133111eb;
  return word ^ (word >> 32);
}

struct HashedTensor {
  const void* data;  // contiguous
  int64_t bytes;
  int64_t first;  // unit; after those of the tensors before
};

// One unit is a word of 8 bytes of one tensor; the last may be shorter.
struct HashWork {
  static constexpr int64_t kWord = 8;
  HashedTensor tensors[kMaxHashed];
  int32_t count;
  uint64_t start;          // the hash of what is no tensor
  const uint64_t* before;  // a hash that this one goes on from, or null

  void add(const void* data, int64_t bytes) {
    tensors[count++] = {data, bytes, units};
    units += (bytes + kWord - 1) / kWord;
  }

  // What is added once.
  TLM_HOST_DEVICE uint64_t base() const { return start + (before ? mixed_word(*before, ~uint64_t(0)) : 0); }

  template <typename Index>
  TLM_HOST_DEVICE uint64_t operator()(Index unit) const {
    int32_t i = 0;
    while (i + 1 < count && (Index)tensors[i + 1].first <= unit) ++i;
    const HashedTensor& x = tensors[i];
    const int64_t at = ((int64_t)unit - x.first) * kWord;
    const char* from = (const char*)x.data + at;
    uint64_t word = 0;
    if (at + kWord <= x.bytes && (uintptr_t)x.data % kWord == 0) {
      word = *(const uint64_t*)from;
    } else {
      const int64_t left = x.bytes - at < kWord ? x.bytes - at : kWord;
      for (int64_t b = 0; b < left; ++b) word |= (uint64_t)(uint8_t)from[b] << (8 * b);
    }
    return mixed_word(word, (uint64_t)unit);
  }

  int64_t units = 0;
};

// plan/traffic.h's SealCode, in which a digit rides as two numbers.
struct DigitPair {
  double first, second;
};

TLM_HOST_DEVICE DigitPair digit_pair(uint64_t hash, int64_t i, int64_t bits, bool complement) {
  const auto digit = (double)((hash >> (i * bits)) & (((uint64_t)1 << bits) - 1));
  return {digit, complement ? 1 - digit : digit * digit};
}

// Whether all ranks had one digit, from the sums of its two numbers. Cauchy and Schwarz: equal only where all are.
TLM_HOST_DEVICE bool one_digit(DigitPair sums, int64_t ranks, bool complement) {
  return complement ? sums.first == 0 || sums.second == 0
                    : (double)ranks * sums.second == sums.first * sums.first;
}

template <typename Scalar>
using SealReal = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// One unit is a digit.
template <typename Scalar>
struct DigitsWork {
  const uint64_t* hash;
  Scalar* digits;
  int64_t bits;
  bool complement;

  template <typename Index>
  TLM_HOST_DEVICE void operator()(Index i) const {
    const DigitPair pair = digit_pair(*hash, i, bits, complement);
    digits[2 * i] = (Scalar)(SealReal<Scalar>)pair.first;
    digits[2 * i + 1] = (Scalar)(SealReal<Scalar>)pair.second;
  }
};

// The only unit: verdict[0] becomes 1 where ranks differ, verdict[1] this rank's hash.
template <typename Scalar>
struct VerdictWork {
  const Scalar* sums;
  const int64_t* hash;
  int64_t* verdict;
  int64_t ranks, digits;
  bool complement;

  template <typename Index>
  TLM_HOST_DEVICE void operator()(Index) const {
    bool alike = true;
    for (int64_t i = 0; i < digits; ++i) {
      const SealReal<Scalar> first = sums[2 * i], second = sums[2 * i + 1];
      alike = alike && one_digit({first, second}, ranks, complement);
    }
    verdict[1] = *hash;
    if (!alike) verdict[0] = 1;
  }
};

}  // namespace two_level_mha
