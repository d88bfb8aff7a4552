// What this CPU multiplies with, as torch and oneDNN let it: they can be held to less than it has
// (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA), and then so are we.
#pragma once

#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <exception>
#include <string>
#include <type_traits>

#include "../request.h"
#include "code_memory.h"

namespace two_level_mha {

// Whether brgemm multiplies C, bfloat16 in interleaved pairs. Found by trying: cpublas::could_pack asks for
// AMX, which brgemm does not need, and torch lets bfloat16 through to oneDNN from AVX512 on, which then has no
// kernel for it below AVX512-BF16.
template <class C>
bool multiplies() {
  constexpr int64_t n = 16;
  constexpr bool kPairs = std::is_same_v<C, c10::BFloat16>;
  const C rows[2] = {}, panel[2 * n] = {};
  float out[n];
  if (!has_code_memory()) return false;
  try {
    at::native::cpublas::brgemm(1, n, 2, 2, n, n, false, rows, panel, out, kPairs);
  } catch (const std::exception&) {  // torch's, or oneDNN's own
    return false;
  }
  at::native::cpublas::brgemm_release(kPairs);
  return true;
}

inline CpuLevel find_cpu_level() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  const bool avx512 = capability == "AVX512";
  if ((!avx512 && capability != "AVX2") || !multiplies<float>()) return CpuLevel::portable;
  if (!avx512) return CpuLevel::avx2;
  if (!multiplies<c10::BFloat16>()) return CpuLevel::avx512;
  if (at::native::cpublas::could_pack(at::kHalf)) return CpuLevel::amx_fp16;
  if (at::native::cpublas::could_pack(at::kBFloat16)) return CpuLevel::amx;
  return CpuLevel::avx512_bf16;
#else
  return CpuLevel::portable;
#endif
}

inline CpuLevel cpu_level() {
  static const CpuLevel level = find_cpu_level();
  return level;
}

}  // namespace two_level_mha
