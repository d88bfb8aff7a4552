#include "gathered_weights.h"

#include <ATen/core/Tensor.h>

#include "../comm/gather.h"
#include "move.h"

namespace two_level_mha {

namespace {

// Blocks of columns, `dim`, of this rank's slice -> whole. Fewer than four dims are padded with ones.
std::vector<Tensor> whole(const std::vector<Tensor>& blocks, int64_t dim, const Context& context) {
  std::vector<Tensor> four_d;
  for (const Tensor& block : blocks) {
    four_d.push_back(filled(block, dim, context));
    while (four_d.back().dim() < 4) four_d.back() = four_d.back().unsqueeze(-1);
  }
  auto out = gather_along(four_d, dim, context.sizes.d, /*zigzag=*/false, context.groups.slice);
  for (size_t i = 0; i < out.size(); ++i)
    while (out[i].dim() > blocks[i].dim()) out[i] = out[i].squeeze(-1);
  return out;
}

}  // namespace

std::pair<QkvWeights, ExtraKeys> gather_qkv_weights(const QkvWeights& weights, const ExtraKeys& extra,
                                                    const Context& context) {
  QkvWeights w = weights;
  ExtraKeys e = extra;
  std::vector<Tensor> blocks{w.q, w.k, w.v};
  std::array<std::optional<Tensor>*, 5> optional{&w.q_bias, &w.k_bias, &w.v_bias, &e.bias_k, &e.bias_v};
  for (auto* x : optional)
    if (*x) blocks.push_back(**x);
  auto found = whole(blocks, 1, context);
  w.q = found[0], w.k = found[1], w.v = found[2];
  size_t next = 3;
  for (auto* x : optional)
    if (*x) *x = found[next++];
  return {w, e};
}

Tensor gather_out_weight(const Tensor& weight, const Context& context) {
  return whole({weight}, 2, context)[0];
}

}  // namespace two_level_mha
