#include "pass.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include "attend/local.h"
#include "attend/weights.h"
#include "combine/dealt.h"
#include "combine/reduce.h"
#include "combine/weights.h"
#include "move/gather.h"
#include "project/whole.h"
#include "sizes.h"

namespace two_level_mha {

namespace {

// What the projections will compute in, which decides how many bytes move.
at::ScalarType working_dtype(const Tensor& x) {
  const auto device = x.device().type();
  const bool cast =
      !x.is_meta() && at::autocast::is_autocast_enabled(device) && x.scalar_type() != at::kDouble;
  return cast ? at::autocast::get_autocast_dtype(device) : x.scalar_type();
}

Layout layout_before(const Tensor& query, const Tensor& key, const QkvWeights& weights,
                     const ExtraKeys& extra, const Place& place, bool batch_first,
                     const c10::SymInt& position) {
  const int64_t rows = batch_first ? 1 : 0, d = fixed_size(weights.k, 1) * place.grid.slices;
  const int64_t H = fixed_size(weights.q, 0) * (place.whole_heads ? place.grid.slices : 1);
  CallShape shape{query.sym_size(1 - rows), query.sym_size(rows),
                  key.sym_size(rows) + int64_t(extra.bias_k.has_value()) + int64_t(extra.zero), position};
  return Layout(place, shape, H, fixed_size(weights.k, 0), d, fixed_size(query, 2), working_dtype(query),
                query.is_cuda());
}

// dtype: that of `enter`'s results. What acts between the halves may widen q and k, never v.
Layout layout_after(const Tensor& q, const Tensor& k, at::ScalarType dtype, const Output& output,
                    const Place& place) {
  const bool by_slices = !place.concat && !place.whole_heads;
  const int64_t d = fixed_size(output.weight, 2) * (by_slices ? place.grid.slices : 1);
  return Layout(place, {output.batch, output.length, k.sym_size(2), output.position}, fixed_size(q, 1),
                fixed_size(k, 1), d, fixed_size(output.weight, 0), dtype, q.is_cuda());
}

// Keys every query sees, after the given ones; biases (K, width of x).
Tensor with_extra_keys(const Tensor& x, const std::optional<Tensor>& bias, bool zero) {
  std::vector<Tensor> rows{x};
  auto add = [&](const Tensor& row) {
    rows.push_back(row.to(x.scalar_type())
                       .unsqueeze(1)
                       .unsqueeze(0)
                       .expand_symint({x.sym_size(0), x.sym_size(1), 1, x.sym_size(3)}));
  };
  if (bias) add(*bias);
  if (zero) add(at::zeros({fixed_size(x, 1), fixed_size(x, 3)}, x.options()));
  return rows.size() == 1 ? x : at::cat(rows, 2);
}

// The paper's concatenation: O of all slices and heads (B, h, L, d).
Tensor concatenate_heads(const Tensor& o, const Place& place) {
  if (!place.whole_heads)
    return hierarchical_all_gather(o, 1, 3, place.groups, /*slices_first=*/false, /*replicated=*/true);
  return hierarchical_all_gather(o.unsqueeze(1), 1, 2, place.groups, false, true).flatten(1, 2);
}

Tensor combine(Tensor o, const Output& output, const Layout& layout, const Place& place) {
  const bool by_tokens = layout.by_tokens() && !place.concat;
  const bool swap = !output.batch_first && !by_tokens;  // before the copy that projecting makes, not after it
  if (swap) o = o.transpose(0, 2);
  Tensor y;
  if (place.concat) {
    y = out_projection(concatenate_heads(o, place), output.weight, output.bias);
  } else if (place.grid.size() == 1) {
    y = out_projection(o, output.weight, output.bias);
  } else {
    y = by_tokens ? reduce_dealt(out_projection(o, whole_out_weight(output.weight, place), std::nullopt),
                                 layout, place)
                  : reduce_replicated(out_projection(o, output.weight, std::nullopt), place.groups,
                                      place.reduce_dtype);
    if (output.bias) y = y + output.bias->to(y.scalar_type());
  }
  return output.batch_first || swap ? y : y.transpose(0, 1).contiguous();
}

// The tokens of a call through whole weights: nothing moves but the weights, and the keys and values where
// the rows are dealt out.
std::tuple<Tensor, Tensor, Tensor> enter_by_tokens(std::vector<Tensor> inputs,
                                                   const std::array<size_t, 3>& qkv,
                                                   const QkvWeights& weights, const ExtraKeys& extra,
                                                   const Place& place, const Layout& layout,
                                                   bool batch_first) {
  const auto [whole, whole_extra] = whole_weights(weights, extra, place);
  for (Tensor& x : inputs)
    if (!batch_first) x = x.transpose(0, 1);
  const auto keys = inputs[qkv[1]].sym_size(1);
  inputs = enter_dealt(inputs, layout, place);
  auto [q, k, v] = qkv_projection(inputs[qkv[0]], inputs[qkv[1]], inputs[qkv[2]], whole, true);
  if (layout.dealt_dim() == 2) {
    auto rows = gather_along({k, v}, 2, keys, layout.zigzag, place.groups.slice);
    k = rows[0], v = rows[1];
  }
  return {q, with_extra_keys(k, whole_extra.bias_k, extra.zero),
          with_extra_keys(v, whole_extra.bias_v, extra.zero)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> enter(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const QkvWeights& weights, const ExtraKeys& extra,
                                         const Place& place, bool batch_first, const c10::SymInt& position) {
  std::vector<Tensor> inputs{query};
  std::array<size_t, 3> qkv{0, 0, 0};  // which of the distinct inputs is the query, the key, the value
  if (!key.is_same(query)) qkv[1] = inputs.size(), inputs.push_back(key);
  qkv[2] = value.is_same(query) ? 0 : qkv[1];
  if (!value.is_same(inputs[qkv[2]])) qkv[2] = inputs.size(), inputs.push_back(value);

  const Layout layout = layout_before(query, key, weights, extra, place, batch_first, position);
  if (layout.by_tokens()) return enter_by_tokens(inputs, qkv, weights, extra, place, layout, batch_first);
  inputs = enter_replicated(inputs, place.groups, place.reduce_dtype);
  auto [q, k, v] = qkv_projection(inputs[qkv[0]], inputs[qkv[1]], inputs[qkv[2]], weights, batch_first);
  k = with_extra_keys(k, extra.bias_k, extra.zero);
  v = with_extra_keys(v, extra.bias_v, extra.zero);
  auto moved = move_in({q, k, v}, layout, place.groups.slice);
  if (layout.scheme == Scheme::heads && layout.row.k == Move::replicate && layout.m > 1) {
    const int64_t shared = layout.j * fixed_size(moved[1], 1) / layout.m;  // the one these query heads read
    moved[1] = moved[1].narrow(1, shared, 1);
    moved[2] = moved[2].narrow(1, shared, 1);
  }
  return {moved[0], moved[1], moved[2]};
}

Tensor leave(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend, const Output& output,
             const Place& place) {
  const Layout layout = layout_after(q, k, v.scalar_type(), output, place);
  auto [o, logsumexp] = attend_local(q, k, v, attend, output.first_key, place, layout, partial_attention);
  if (layout.row.out == Move::merge)
    o = merge_out(o, logsumexp, layout, place.groups.slice);
  else if (!layout.by_tokens() || place.concat)
    o = move_out(o, layout, place.groups.slice);
  return combine(o, output, layout, place);
}

std::tuple<Tensor, Tensor> leave_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Attend& attend, const Output& output, const Place& place,
                                              bool average) {
  const Layout layout = layout_after(q, k, v.scalar_type(), output, place);
  TORCH_CHECK_VALUE(layout.row.out != Move::merge,
                    "attention weights are not available with scheme 'position'");
  auto [o, weights] = attend_local(q, k, v, attend, output.first_key, place, layout, attention_with_weights);
  if (!layout.by_tokens() || place.concat) o = move_out(o, layout, place.groups.slice);
  return {combine(o, output, layout, place), gather_weights(weights, layout, place, average)};
}

DealtRows deal_rows(const std::vector<Tensor>& xs, const Tensor& q, const Tensor& k, const Output& output,
                    const Place& place) {
  const Layout layout = layout_after(q, k, q.scalar_type(), output, place);
  DealtRows dealt;
  for (const Tensor& x : xs) {
    const bool one_for_all = layout.dealt_dim() == 0 && x.sym_size(0) == 1;
    dealt.queries.push_back(one_for_all ? x : deal(x, layout));
    dealt.keys.push_back(layout.row.k == Move::cyclic                  ? deal_cyclic(x, layout)
                         : layout.row.k == Move::batch && !one_for_all ? deal(x, layout)
                                                                       : x);
  }
  return dealt;
}

}  // namespace two_level_mha
