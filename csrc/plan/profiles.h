// Rates of hardware, for predictions only. Equal on all ranks, so that all ranks choose alike. They are data:
// the table has the profiles that are known, and numbers measured elsewhere make other rates. No torch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "traffic.h"

namespace two_level_mha {

struct Rates {
  int64_t flops;    // FLOP/s reached by attention and projections in the working precision
  int64_t memory;   // bytes/s read from memory
  int64_t link;     // bytes/s that one rank sends to ranks of its node
  int64_t network;  // bytes/s that one rank's adapter sends to other nodes
  int64_t latency;  // nanoseconds of one collective
  int64_t node;     // ranks in a node
  int64_t equal;    // head_dim up to which half precision pads values to the width of keys; 0: it does not

  // As plain integers, and back.
  using Numbers = std::array<int64_t, 7>;
  Numbers numbers() const { return {flops, memory, link, network, latency, node, equal}; }
  static Rates from_numbers(const Numbers& numbers) {
    const auto& [flops, memory, link, network, latency, node, equal] = numbers;
    const Rates rates{flops, memory, link, network, latency, node, equal};
    if (!rates.valid()) throw std::invalid_argument("rates must be positive, latency and equal not negative");
    return rates;
  }

  // What others are divided by is positive.
  bool valid() const {
    return std::min({flops, memory, link, network, node}) >= 1 && std::min(latency, equal) >= 0;
  }

  // Bytes/s that a rank of an (n, m) grid sends along an axis. Ranks are numbered along the slice axis first.
  int64_t bandwidth(Axis axis, int64_t n, int64_t m) const {
    if (n * m <= node || (axis == Axis::slice && node % m == 0)) return link;
    if (axis == Axis::slice) return network;  // pairwise: hardly a peer is in the same node
    // A ring in rank order leaves a node once, where the other rings of the node share the adapters with it.
    const int64_t neighbours = axis == Axis::grid ? node : std::max<int64_t>(1, node / m);
    return neighbours > link / network ? link : network * neighbours;  // the lesser; no product overflows
  }
};

struct Profile {
  const char* name;
  const char* device;  // the type of device that it stands for where no profile is named
  Rates rates;
  const char* source;
};

// flops: what good kernels reach, not the peak.
inline constexpr std::array<Profile, 2> kProfiles{{
    {"h100",
     "cuda",
     {400'000'000'000'000, 2'500'000'000'000, 350'000'000'000, 50'000'000'000, 20'000, 8, 256},
     "H100 SXM data sheet: 8 GPUs a node, NVLink 450 GB/s a way, an adapter of 400 Gb/s a GPU; rates "
     "assumed"},
    {"cpu",
     "cpu",
     {90'000'000'000, 10'000'000'000, 1'000'000'000, 1'000'000'000, 250'000, 1 << 20, 0},
     "Gloo over loopback, one AVX-512 core a rank, float32: measured by benchmarks/predictions.py"},
}};

inline const Profile& named_profile(std::string_view name) {
  std::string names;
  for (const Profile& profile : kProfiles) {
    if (profile.name == name) return profile;
    names += (names.empty() ? "" : ", ") + std::string(profile.name);
  }
  throw std::invalid_argument("profile must be one of " + names + ", got '" + std::string(name) + "'");
}

}  // namespace two_level_mha
