// Attention of few rows on the CPU, as when a token at a time is generated; see contract.h for the contract.
#pragma once

#include "../contract.h"

namespace two_level_mha {

Forward decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

}  // namespace two_level_mha
