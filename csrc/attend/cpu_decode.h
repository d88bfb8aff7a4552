// Attention of few rows on the CPU, as when a token at a time is generated; see attention.h for the contract.
#pragma once

#include "attention.h"

namespace two_level_mha {

bool decode_supports(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

Forward decode_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params);

}  // namespace two_level_mha
