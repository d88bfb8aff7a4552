// What a call needs of a kernel and what the machine is, as plain numbers: from these alone kernels.h tells
// which kernel serves. No torch.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "visible.h"

namespace two_level_mha {

enum class Dtype : uint8_t { float64, float32, bfloat16, float16 };
enum class MaskKind : uint8_t { none, boolean, additive };

// Sizes as in contract.h.
struct Request {
  Dtype dtype = Dtype::float32;
  int64_t B = 1, H = 1, K = 1, L = 1, S = 1, d_qk = 64, d_v = 64;
  Visible visible;
  bool softcap = false, dropout = false;
  MaskKind mask = MaskKind::none;
  bool mask_rows = false;  // the mask differs from row to row
  bool backward = false;
  bool grad_logsumexp = false, grad_mask = false;  // of a backward
};

// Each has what is before it. portable: none of the others, or oneDNN's brgemm does not multiply float.
enum class CpuLevel : uint8_t { portable, avx2, avx512, avx512_bf16, amx, amx_fp16 };
constexpr const char* kCpuLevels[] = {"portable", "AVX2", "AVX512", "AVX512-BF16", "AMX", "AMX-FP16"};

struct Machine {
  bool cuda = false;
  CpuLevel cpu = CpuLevel::portable;
  int arch = 0;       // of the GPU, 90 for sm_90; 0: not known, since the CUDA sources were left out
  int64_t cudnn = 0;  // as 91501 for 9.15.1
  bool cudnn_enabled = true, flash_enabled = true, efficient_enabled = true;  // in torch.backends.cuda
  bool cudnn_backward = true;  // whether cuDNN's own backward may serve; else flash's follows its forward
  // Whether the memory-efficient backward hides the keys before a window where there are more keys than rows:
  // since torch 2.15.
  bool offset_windows = true;
};

// Everything that a call may ask for and that a kernel may lack. Bits; kFeatureNames has their names.
enum Feature : uint32_t {
  kFloat64 = 1 << 0,
  kFloat32 = 1 << 1,
  kBFloat16 = 1 << 2,
  kFloat16 = 1 << 3,
  kOtherWidth = 1 << 4,
  kGroups = 1 << 5,
  kNothing = 1 << 6,
  kOneRange = 1 << 7,
  kCausal = 1 << 8,
  kOffset = 1 << 9,
  kBefore = 1 << 10,
  kWindow = 1 << 11,
  kKeyStride = 1 << 12,
  kSoftcap = 1 << 13,
  kBoolMask = 1 << 14,
  kAdditiveMask = 1 << 15,
  kDropout = 1 << 16,
  kBackward = 1 << 17,
  kGradLogsumexp = 1 << 18,
  kGradMask = 1 << 19,
};
constexpr const char* kFeatureNames[] = {
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "d_v != d_qk",
    "groups of query heads",
    "nothing to attend to",
    "one range of keys for all rows",
    "causal",
    "a causal offset",
    "rows before the first key",
    "window",
    "key_stride",
    "softcap",
    "bool mask",
    "additive mask",
    "dropout",
    "backward",
    "a gradient of logsumexp",
    "a gradient of the mask",
};
constexpr uint32_t kAllFeatures = (1 << std::size(kFeatureNames)) - 1;

// The features that a call needs. A causal mask, window or key_stride that shows all rows the same keys needs
// no more than kOneRange, and nothing if these are all keys; nor does a window that hides no key.
inline uint32_t needs(const Request& r) {
  constexpr uint32_t kDtypes[] = {kFloat64, kFloat32, kBFloat16, kFloat16};
  uint32_t bits = kDtypes[int(r.dtype)];
  auto need = [&](bool asked, Feature feature) { bits |= asked ? uint32_t(feature) : 0; };
  need(r.d_v != r.d_qk, kOtherWidth);
  need(r.H != r.K, kGroups);
  need(r.softcap, kSoftcap);
  need(r.mask == MaskKind::boolean, kBoolMask);
  need(r.mask == MaskKind::additive, kAdditiveMask);
  need(r.dropout, kDropout);
  need(r.backward, kBackward);
  need(r.grad_logsumexp, kGradLogsumexp);
  need(r.grad_mask, kGradMask);
  if (r.B == 0 || r.H == 0 || r.L == 0 || r.S == 0 || r.d_qk == 0 || r.d_v == 0) return bits | kNothing;
  const Visible& visible = r.visible;
  if (const auto all = visible.keys_of_all(r.L, r.S)) {
    need(all->empty(), kNothing);
    need(!all->empty() && !(*all == Range{0, r.S}), kOneRange);
    return bits;
  }
  need(true, kCausal);
  need(*visible.causal > 0, kOffset);
  need(*visible.causal < 0, kBefore);
  need(visible.window && visible.keys_of(r.L - 1, r.S).begin > 0, kWindow);
  need(visible.key_stride != 1, kKeyStride);
  return bits;
}

inline std::vector<std::string> feature_list(uint32_t bits) {
  std::vector<std::string> names;
  for (size_t i = 0; i < std::size(kFeatureNames); ++i)
    if (bits >> i & 1) names.emplace_back(kFeatureNames[i]);
  return names;
}

// With commas between them.
inline std::string feature_names(uint32_t bits) {
  std::string names;
  for (const std::string& name : feature_list(bits)) names += (names.empty() ? "" : ", ") + name;
  return names;
}

}  // namespace two_level_mha
