#include "whole.h"

#include <ATen/ATen.h>

#include "../move/pack.h"

namespace two_level_mha {

namespace {

// Blocks split along `dim` over the slice group -> whole. Fewer than four dims are padded with ones at the
// end.
std::vector<Tensor> whole(const std::vector<Tensor>& blocks, int64_t dim, const Place& place) {
  const int64_t m = place.grid.slices;
  std::vector<Tensor> four_d;
  std::vector<c10::SymInt> sizes;
  for (const Tensor& block : blocks) {
    Tensor x = block;
    while (x.dim() < 4) x = x.unsqueeze(-1);
    for (int64_t i = 0; i < 4; ++i) sizes.push_back(i == dim ? x.sym_size(i) * m : x.sym_size(i));
    four_d.push_back(x);
  }
  Tensor packed = pack(four_d, std::vector<int64_t>(blocks.size(), -1), 1, false);
  Tensor buffer = start(Collective::all_gather, packed, place.groups.slice).wait();
  auto out = unpack(buffer, sizes, std::vector<int64_t>(blocks.size(), dim), m, false);
  for (size_t i = 0; i < out.size(); ++i)
    while (out[i].dim() > blocks[i].dim()) out[i] = out[i].squeeze(-1);
  return out;
}

}  // namespace

std::pair<QkvWeights, ExtraKeys> whole_weights(const QkvWeights& weights, const ExtraKeys& extra,
                                               const Place& place) {
  QkvWeights w = weights;
  ExtraKeys e = extra;
  std::vector<Tensor> blocks{w.q, w.k, w.v};
  std::array<std::optional<Tensor>*, 5> optional{&w.q_bias, &w.k_bias, &w.v_bias, &e.bias_k, &e.bias_v};
  for (auto* x : optional)
    if (*x) blocks.push_back(**x);
  auto found = whole(blocks, 1, place);
  w.q = found[0], w.k = found[1], w.v = found[2];
  size_t next = 3;
  for (auto* x : optional)
    if (*x) *x = found[next++];
  return {w, e};
}

Tensor whole_out_weight(const Tensor& weight, const Place& place) {
  return whole({weight}, 2, place)[0];
}

}  // namespace two_level_mha
