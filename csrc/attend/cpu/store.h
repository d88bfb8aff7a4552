// Writing a float as an element, by integers, since loops over it vectorise.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#include "../../base/host_device.h"

namespace two_level_mha {

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
