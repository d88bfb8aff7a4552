// Rates of known hardware, for predictions only. Equal on all ranks, so that all ranks choose alike.
#pragma once

#include <cstdint>

namespace two_level_mha {

struct Profile {
  const char* name;
  int64_t flops;      // FLOP/s reached by attention in the working precision
  int64_t bandwidth;  // bytes/s sent by one rank over the link of the slice axis
  int64_t latency;    // nanoseconds of one collective
  const char* source;
};

// flops: what a good attention kernel reaches, not the peak.
inline constexpr Profile kProfiles[] = {
    {"cpu", 60'000'000'000, 2'000'000'000, 1'000'000, "Gloo over loopback, one core a rank; measured, +-2x"},
    {"cuda", 400'000'000'000'000, 350'000'000'000, 20'000,
     "H100 SXM data sheet, NVLink 450 GB/s a way; assumed"},
};

inline const Profile& profile_for(bool cuda) {
  return kProfiles[cuda ? 1 : 0];
}

}  // namespace two_level_mha
