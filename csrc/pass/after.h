// What acts on attention's output where it was computed, before it moves: sinks and gates.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "context.h"

namespace two_level_mha {

using at::Tensor;

// gate (B, H, L, d) as q lies: what the output is multiplied with. sinks (h,), alike on every rank: of each query head
// the logit of one key more, whose value is zero.
struct After {
  std::optional<Tensor> gate, sinks;
};

// From an operator's list: the gate, which a gated layer has and others may have, then the sinks, if there are any.
// Raises ValueError for another list.
After after_of(const std::optional<std::vector<Tensor>>& list, const Context& context);

// The sinks (H,) of this rank's heads. Where the ranks of a slice group see different keys, each has an equal part.
std::optional<Tensor> own_sinks(const After& after, int64_t heads, const Context& context);

// o (B, H, L, d) and its logsumexp (B, H, L) with the sinks, which may be absent, among the keys.
void add_sinks(Tensor& o, Tensor& logsumexp, const std::optional<Tensor>& sinks);

// o times its gate, which may be absent; o may be this rank's slice of d.
Tensor with_gate(const Tensor& o, const std::optional<Tensor>& gate, const Context& context);

}  // namespace two_level_mha
