// Loops compiled once for each set of vector instructions that torch compiles its own for. level.h picks.
#pragma once

#include <type_traits>

#include "level.h"

// vectorised([=]() TLM_INLINE { .. }): the loop in the braces, for this CPU
#define TLM_INLINE __attribute__((always_inline))

namespace two_level_mha {

#if defined(__x86_64__) && defined(__GNUC__)  // clang says so too

// The body comes by value, so that its numbers stay in registers; always inline, or it keeps its own target.
template <class Body>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) auto run_avx512(Body body) {
  return body();
}
template <class Body>
__attribute__((target("avx2,fma,f16c"))) auto run_avx2(Body body) {
  return body();
}

template <class Body>
auto vectorised(Body body) {
  if (cpu_level() >= CpuLevel::avx512) return run_avx512(body);
  if (cpu_level() >= CpuLevel::avx2) return run_avx2(body);
  return body();
}

#else

template <class Body>
auto vectorised(Body body) {
  return body();
}

#endif

// The same for loops that are written by registers: body is told how many floats one holds.
template <class Body>
auto vectorised_by_lanes(Body body) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (cpu_level() >= CpuLevel::avx512)
    return run_avx512([=]() TLM_INLINE { return body(std::integral_constant<int, 16>{}); });
#endif
  return vectorised([=]() TLM_INLINE { return body(std::integral_constant<int, 8>{}); });
}

}  // namespace two_level_mha
