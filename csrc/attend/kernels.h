// The table of attention kernels and which of them serves a call: a pure function of request.h's numbers. No
// torch; registry.h runs what is found here.
#pragma once

#include <limits>
#include <string_view>

#include "../base/arithmetic.h"
#include "aten/corner.h"
#include "request.h"

namespace two_level_mha {

// Where a kernel runs: on CPUs of at least a level, or on GPUs of architectures first .. last.
struct Platform {
  enum Kind { any, cpu, cuda } kind;
  int first = 0, last = 0;
};

constexpr Platform kAnyDevice{Platform::any};
constexpr Platform cpu_from(CpuLevel level) {
  return {Platform::cpu, int(level)};
}
constexpr Platform sm(int first, int last = std::numeric_limits<int>::max()) {
  return {Platform::cuda, first, last};
}

// Why not, or null.
using Reason = const char* (*)(const Request&, const Machine&);

struct Kernel {
  const char* name;
  Platform platform;
  uint32_t features;  // what it supports of what a call may need
  Reason cannot;      // beyond platform and features: what it would answer wrongly, or not at all
  Reason yields;      // what it could serve, but a later row serves faster
};

// --- what the rows ask beyond features

namespace reasons {

inline const char* none(const Request&, const Machine&) {
  return nullptr;
}

inline const char* no_width(const Request& r, const Machine&) {
  return r.d_qk == 0 || r.d_v == 0 ? "has no panels of width 0" : nullptr;
}

inline const char* without_amx(const Request& r, const Machine& m) {
  const CpuLevel least = r.dtype == Dtype::float16 ? CpuLevel::amx_fp16 : CpuLevel::amx;
  if (m.cpu >= least) return nullptr;
  return r.dtype == Dtype::float16 ? "is the fastest in float16 only where the CPU has AMX-FP16"
                                   : "is the fastest in bfloat16 only where the CPU has AMX";
}

// The other kernels read K and V again for each query head of a KV head, whose rows are stacked here.
inline const char* many_rows(const Request& r, const Machine& m) {
  const int64_t rows = r.L * r.H;
  if (r.dtype == Dtype::float16 && !without_amx(r, m) && rows > 16 * r.K)
    return "is slower than AMX with more than 16 rows for a KV head in float16";
  if (rows <= (r.L <= 4 ? 512 : 128) * r.K) return nullptr;
  return r.L <= 4 ? "is slower than cpu_blocked with more than 512 rows for a KV head"
                  : "is slower than cpu_blocked with more than 128 rows for a KV head";
}

// The first reason that with(stripe, its corner) gives, of the stripes of a call (corner.h).
template <class With>
const char* of_stripes(const Request& r, const With& with) {
  for (const Stripe& stripe : stripes_of(r.visible, r.L, r.S))
    if (const char* reason = with(stripe, Corner(stripe.visible, stripe.rows, r.S))) return reason;
  return nullptr;
}

// Each stripe is a call of its own kernel.
inline const char* many_stripes(const Request& r) {
  const bool many = !r.visible.keys_of_all(r.L, r.S) && std::min(r.visible.key_stride, r.L) > 1024;
  return many ? "takes key_stride up to 1024" : nullptr;
}

constexpr const char* kPastTheEnd = "takes windows that end at the last key or before";

// d_v = d_qk to flash and cuDNN: the narrower is padded.
inline int64_t common_width(const Request& r) {
  return ceil_div(std::max(r.d_qk, r.d_v), 8) * 8;
}

inline const char* large_batch(const Request& r) {
  return r.B > 65535 ? "takes at most 65535 sequences" : nullptr;
}

// cuDNN 9.15.0 and older read beyond lengths that 128 does not divide (pytorch #169849).
constexpr int64_t kSafeCudnn = 91501;

inline const char* cudnn(const Request& r, const Machine& m) {
  if (!m.cudnn_enabled) return "is switched off: torch.backends.cuda.enable_cudnn_sdp";
  if (m.cudnn < kSafeCudnn) return "needs cuDNN 9.15.1 or newer";
  if (r.backward && !m.cudnn_backward)
    return "has no backward under torch.use_deterministic_algorithms or TORCH_CUDNN_SDPA_AVOID_RECOMPILE";
  const int64_t d = common_width(r);
  if (d > 256) return "takes widths up to 256";
  if (d > 128 && m.arch != 90) return "takes widths above 128 on sm_90 only";
  const char* short_ones = of_stripes(r, [](const Stripe& stripe, const Corner& corner) {
    return stripe.rows == 1 || corner.keys == 1 ? "takes at least two rows and two keys" : nullptr;
  });
  return short_ones ? short_ones : large_batch(r);
}

inline const char* flash(const Request& r, const Machine& m) {
  if (!m.flash_enabled) return "is switched off: torch.backends.cuda.enable_flash_sdp";
  const int64_t d = common_width(r);
  // where shared memory is small the backward of these widths has no kernel
  const bool small = m.arch == 86 || m.arch == 89 || m.arch >= 120;
  if (d > 256) return "takes widths up to 256";
  if (small && d > 192 && d <= 224) return "has no backward for widths 193 to 224 on sm_86, sm_89 and sm_120";
  if (const char* many = many_stripes(r)) return many;
  const char* reason =
      of_stripes(r, [](const Stripe&, const Corner& corner) { return corner.fits ? nullptr : kPastTheEnd; });
  return reason ? reason : large_batch(r);
}

inline const char* efficient(const Request& r, const Machine& m) {
  if (!m.efficient_enabled) return "is switched off: torch.backends.cuda.enable_mem_efficient_sdp";
  if (r.dtype == Dtype::bfloat16 && m.arch < 80) return "needs sm_80 for bfloat16";
  if (const char* many = many_stripes(r)) return many;
  const char* reason = of_stripes(r, [&](const Stripe& stripe, const Corner& corner) -> const char* {
    if (!corner.fits) return kPastTheEnd;
    if (corner.window && r.backward && !m.offset_windows && corner.keys != stripe.rows)
      return "has no backward for windows over more keys than rows before torch 2.15";
    const int64_t keys = ceil_div(corner.keys, 16) * 16;
    const bool large = r.mask_rows && stripe.rows * keys > std::numeric_limits<int32_t>::max();
    return large ? "indexes a mask by 32 bits" : nullptr;
  });
  return reason ? reason : large_batch(r);
}

}  // namespace reasons

// --- the table: the first row that can serve a call and does not yield it serves it. All rows keep one
// contract (contract.h), so the backward of one follows the forward of another.

constexpr uint32_t kHalves = kBFloat16 | kFloat16;
constexpr uint32_t kMasks = kBoolMask | kAdditiveMask;
constexpr uint32_t kOfCpu = (kAllFeatures & ~(kFloat64 | kGradMask));
constexpr uint32_t kOfCuda = kHalves | kOtherWidth | kGroups | kOneRange | kCausal;
constexpr uint32_t kInPieces = kOffset | kBefore | kWindow | kKeyStride;

constexpr Kernel kKernels[] = {
    {"aten_cudnn", sm(90, 109), kOfCuda | kBackward, reasons::cudnn, reasons::none},
    {"aten_flash", sm(80), kOfCuda | kInPieces | kBackward, reasons::flash, reasons::none},
    {"aten_efficient", sm(50), kOfCuda | kFloat32 | kInPieces | kMasks | kBackward | kGradLogsumexp,
     reasons::efficient, reasons::none},
    {"cpu_decode", cpu_from(CpuLevel::avx2), kOfCpu & ~(kDropout | kBackward | kGradLogsumexp),
     reasons::no_width, reasons::many_rows},
    // Masks may leave a row without keys, or with none but finite biases: ATen's answers those otherwise.
    {"aten_cpu", cpu_from(CpuLevel::portable), kHalves | kGroups | kCausal | kBackward, reasons::none,
     reasons::without_amx},
    {"cpu_blocked", cpu_from(CpuLevel::avx2), kOfCpu, reasons::no_width, reasons::none},
    {"chunked", kAnyDevice, kAllFeatures, reasons::none, reasons::none},
};

// --- asking it

inline bool runs_on(const Platform& platform, const Machine& m) {
  if (platform.kind == Platform::any) return true;
  if ((platform.kind == Platform::cuda) != m.cuda) return false;
  return m.cuda ? platform.first <= m.arch && m.arch <= platform.last : platform.first <= int(m.cpu);
}

// Null for a name that is not in the table.
inline const Kernel* find_kernel(std::string_view name) {
  for (const Kernel& kernel : kKernels)
    if (kernel.name == name) return &kernel;
  return nullptr;
}

// The row that serves a call. The last one serves everything.
inline const Kernel& serving(const Request& r, const Machine& m) {
  const uint32_t needed = needs(r);
  for (const Kernel& kernel : kKernels)
    if (runs_on(kernel.platform, m) && !(needed & ~kernel.features) && !kernel.cannot(r, m) &&
        !kernel.yields(r, m))
      return kernel;
  return kKernels[std::size(kKernels) - 1];
}

inline std::string arch_name(int arch) {
  return "sm_" + std::to_string(arch);
}

// "CPUs with AVX2", "sm_80 and newer", ..
inline std::string platform_name(const Platform& p) {
  if (p.kind == Platform::any) return "any device";
  if (p.kind == Platform::cpu) return p.first ? std::string("CPUs with ") + kCpuLevels[p.first] : "CPUs";
  if (p.first == p.last) return arch_name(p.first);
  const bool open = p.last == std::numeric_limits<int>::max();
  return arch_name(p.first) + (open ? " and newer" : " to " + arch_name(p.last));
}

inline std::string machine_name(const Machine& m) {
  if (m.cuda) return m.arch ? arch_name(m.arch) : "a GPU, and the CUDA sources were left out of the build";
  const bool has_level = m.cpu != CpuLevel::portable;
  return has_level ? std::string("a CPU with ") + kCpuLevels[int(m.cpu)] : "a CPU without AVX2";
}

// Why a kernel does not run on a machine, whatever the call; empty if it does.
inline std::string unusable(const Kernel& kernel, const Machine& m) {
  if (runs_on(kernel.platform, m)) return "";
  return "is for " + platform_name(kernel.platform) + ", this is " + machine_name(m);
}

// Why a kernel cannot serve a call, even if it is asked to by name; empty if it can.
inline std::string why_not(const Kernel& kernel, const Request& r, const Machine& m) {
  if (std::string reason = unusable(kernel, m); !reason.empty()) return reason;
  if (const uint32_t missing = needs(r) & ~kernel.features)
    return "does not support " + feature_names(missing) + " (it supports " + feature_names(kernel.features) +
           ")";
  const char* reason = kernel.cannot(r, m);
  return reason ? reason : "";
}

// Why another kernel serves a call; empty for the one that does.
inline std::string why_another(const Kernel& kernel, const Request& r, const Machine& m) {
  const Kernel& chosen = serving(r, m);
  if (&kernel == &chosen) return "";
  if (std::string reason = why_not(kernel, r, m); !reason.empty()) return reason;
  const char* reason = kernel.yields(r, m);
  return reason ? reason : std::string("comes after ") + chosen.name + ", which serves it";
}

}  // namespace two_level_mha
