// Loops compiled once for each set of vector instructions. torch's level picks, not the CPU: the loops then obey
// ATEN_CPU_CAPABILITY as torch's own do.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "../../base/host_device.h"

// vectorised([=]() TLM_INLINE { .. }): the loop in the braces, for this CPU
#define TLM_INLINE __attribute__((always_inline))

namespace two_level_mha {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

enum class Vectors { portable, avx2, avx512 };

inline Vectors find_vectors() {
  const std::string level = at::get_cpu_capability();
  if (level == "AVX512" && __builtin_cpu_supports("x86-64-v4")) return Vectors::avx512;
  const bool avx2 = level == "AVX512" || level == "AVX2";
  return avx2 && __builtin_cpu_supports("x86-64-v3") ? Vectors::avx2 : Vectors::portable;
}

inline Vectors vectors() {
  static const Vectors level = find_vectors();
  return level;
}

// The body comes by value, so that its numbers stay in registers; always inline, or it keeps its own target.
template <class Body>
__attribute__((target("arch=x86-64-v4"))) auto run_avx512(Body body) {
  return body();
}
template <class Body>
__attribute__((target("arch=x86-64-v3"))) auto run_avx2(Body body) {
  return body();
}

template <class Body>
auto vectorised(Body body) {
  if (vectors() == Vectors::avx512) return run_avx512(body);
  if (vectors() == Vectors::avx2) return run_avx2(body);
  return body();
}

#else

template <class Body>
auto vectorised(Body body) {
  return body();
}

#endif

}  // namespace two_level_mha
