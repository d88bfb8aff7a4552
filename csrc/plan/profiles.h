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
  int64_t flops;    // FLOP/s reached by projections in half precision, which prices are counted in
  int64_t memory;   // bytes/s read from memory
  int64_t link;     // bytes/s that one rank sends to ranks of its node
  int64_t network;  // bytes/s that one rank's adapter sends to other nodes
  int64_t latency;  // nanoseconds of one collective
  int64_t node;     // ranks in a node, over which a sum is one all-reduce
  int64_t equal;    // head_dim up to which half precision pads values to the width of keys; 0: it does not
  int64_t flops_single;  // as flops, with elements of 4 bytes or more
  // FLOP/s reached by attention, by bytes of an element, and by the larger of its two widths: up to 128, up
  // to 256, wider.
  int64_t attention_128, attention_256, attention_wide;
  int64_t attention_single_128, attention_single_256, attention_single_wide;
  int64_t hidden;  // percent of an exchange that computing beside it hides

  // As plain integers, and back.
  using Numbers = std::array<int64_t, 15>;
  Numbers numbers() const {
    return {flops,
            memory,
            link,
            network,
            latency,
            node,
            equal,
            flops_single,
            attention_128,
            attention_256,
            attention_wide,
            attention_single_128,
            attention_single_256,
            attention_single_wide,
            hidden};
  }
  static Rates from_numbers(const Numbers& n) {
    const Rates rates{n[0], n[1], n[2],  n[3],  n[4],  n[5],  n[6], n[7],
                      n[8], n[9], n[10], n[11], n[12], n[13], n[14]};
    if (!rates.valid()) throw std::invalid_argument(kInvalid);
    return rates;
  }

  static constexpr const char* kInvalid =
      "rates must be positive, latency and equal not negative, hidden from 0 to 100";

  // What others are divided by is positive.
  bool valid() const {
    return std::min({flops, memory, link, network, node, flops_single, attention_128, attention_256,
                     attention_wide, attention_single_128, attention_single_256, attention_single_wide}) >=
               1 &&
           std::min({latency, equal, hidden}) >= 0 && hidden <= 100;
  }

  int64_t projections(int64_t element_size) const { return element_size > 2 ? flops_single : flops; }

  // width: the larger of those of keys and values, as the kernel has them.
  int64_t attention(int64_t element_size, int64_t width) const {
    if (element_size > 2)
      return width <= 128   ? attention_single_128
             : width <= 256 ? attention_single_256
                            : attention_single_wide;
    return width <= 128 ? attention_128 : width <= 256 ? attention_256 : attention_wide;
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

// What good kernels reach, not the peak. h100: assumed, none of it measured here. In float32 projections run without
// tensor cores (67 TFLOP/s at most), and attention takes three tf32 products for each of its own.
// cpu: over loopback the cores that compute also carry what is sent, so that nothing is hidden. A node of one, since there the three stages of a sum add up in float32, and one all-reduce would round half
// precision at every step.
inline constexpr std::array<Profile, 2> kProfiles{{
    {"h100",
     "cuda",
     {400'000'000'000'000, 2'500'000'000'000, 350'000'000'000, 50'000'000'000, 20'000, 8, 256,
      50'000'000'000'000, 400'000'000'000'000, 300'000'000'000'000, 130'000'000'000'000, 80'000'000'000'000,
      80'000'000'000'000, 40'000'000'000'000, 90},
     "H100 SXM data sheet: 8 GPUs a node, NVLink 450 GB/s a way, an adapter of 400 Gb/s a GPU; rates "
     "assumed"},
    {"cpu",
     "cpu",
     {90'000'000'000, 10'000'000'000, 1'000'000'000, 1'000'000'000, 250'000, 1, 0, 90'000'000'000,
      90'000'000'000, 90'000'000'000, 90'000'000'000, 90'000'000'000, 90'000'000'000, 90'000'000'000, 0},
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
