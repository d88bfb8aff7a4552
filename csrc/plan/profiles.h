// Rates of known hardware, for predictions only. Equal on all ranks, so that all ranks choose alike.
#pragma once

#include <algorithm>
#include <cstdint>

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

  // Bytes/s that a rank of an (n, m) grid sends along an axis. Ranks are numbered along the slice axis first.
  int64_t bandwidth(Axis axis, int64_t n, int64_t m) const {
    if (n * m <= node || (axis == Axis::slice && node % m == 0)) return link;
    if (axis == Axis::slice) return network;  // pairwise: hardly a peer is in the same node
    // A ring in rank order leaves a node once, where the other rings of the node share the adapters with it.
    const int64_t neighbours = axis == Axis::grid ? node : std::max<int64_t>(1, node / m);
    return std::min(link, network * neighbours);
  }
};

struct Profile : Rates {
  const char* name;
  const char* source;
};

// flops: what good kernels reach, not the peak.
inline constexpr Profile kProfiles[] = {
    {{90'000'000'000, 10'000'000'000, 1'000'000'000, 1'000'000'000, 250'000, 1 << 20, 0},
     "cpu",
     "Gloo over loopback, one AVX-512 core a rank, float32: measured by benchmarks/predictions.py"},
    {{400'000'000'000'000, 2'500'000'000'000, 350'000'000'000, 50'000'000'000, 20'000, 8, 256},
     "cuda",
     "H100 SXM data sheet: 8 GPUs a node, NVLink 450 GB/s a way, an adapter of 400 Gb/s a GPU; rates "
     "assumed"},
};

inline const Profile& profile_for(bool cuda) {
  return kProfiles[cuda ? 1 : 0];
}

}  // namespace two_level_mha
