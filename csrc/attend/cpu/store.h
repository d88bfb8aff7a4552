// Elements as floats and floats as elements, by integers, since loops over them vectorise.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "../../base/host_device.h"

namespace two_level_mha {

TLM_HOST_DEVICE float load(const float* x, int64_t i) {
  return x[i];
}

TLM_HOST_DEVICE float load(const c10::BFloat16* x, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(x)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

TLM_HOST_DEVICE float load(const c10::Half* x, int64_t i) {
  return c10::detail::fp16_ieee_to_fp32_value(x[i].x);
}

TLM_HOST_DEVICE void store(float* x, int64_t i, float value) {
  x[i] = value;
}

// Round to nearest even; NaN, whose low bits a carry could turn into infinity, gets a quiet bit.
TLM_HOST_DEVICE void store(c10::BFloat16* x, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  reinterpret_cast<uint16_t*>(x)[i] = value != value ? 0x7fc0 : rounded;
}

}  // namespace two_level_mha
