#include "pass.h"

#include <ATen/ATen.h>

#include "sizes.h"

#include <functional>

#include "attend/weights.h"
#include "combine/reduce.h"
#include "combine/weights.h"
#include "move/pack.h"

namespace two_level_mha {

namespace {

// What a call decides once: the scheme's row and the geometry of the rows this rank attends for.
struct Layout {
  const SchemeRow& row;
  int64_t m, j;
  bool zigzag;
  c10::SymInt B, L;

  Layout(const Place& place, const c10::SymInt& batch, const c10::SymInt& length, const c10::SymInt& keys,
         int64_t H, int64_t K, int64_t d, const Tensor& like)
      : row(scheme_row(resolve_scheme(place.scheme,
                                      CallSizes<c10::SymInt>{batch, length, keys, H, K, d, place.grid.slices},
                                      like.element_size(), profile_for(like.is_cuda())))),
        m(place.grid.slices),
        j(place.slice),
        zigzag(place.causal && row.q == Move::rows),
        B(batch),
        L(length) {}

  // Runs of consecutive rows that this rank holds: (first global row, rows).
  std::vector<std::pair<c10::SymInt, c10::SymInt>> row_runs() const {
    if (row.q != Move::rows || m == 1) return {{c10::SymInt(0), L}};
    if (!zigzag) return {{ceil_div(L, m) * j, ceil_div(L, m)}};
    auto chunk = ceil_div(L, 2 * m);
    return {{chunk * j, chunk}, {chunk * (2 * m - 1 - j), chunk}};
  }
};

// Moves tensors (B, heads, length, E) into their layouts with d whole, in one exchange.
std::vector<Tensor> move_in(std::vector<Tensor> xs, const std::vector<Move>& moves, const Layout& layout,
                            const Group& group) {
  std::vector<Tensor> moving;
  std::vector<int64_t> dims;
  bool all_replicated = true;
  for (size_t i = 0; i < xs.size(); ++i)
    if (moves[i] != Move::keep) {
      moving.push_back(xs[i]);
      dims.push_back(int64_t(moves[i]));
      all_replicated &= moves[i] == Move::replicate;
    }
  if (moving.empty() || layout.m == 1) return xs;
  const int64_t m = layout.m;
  Tensor packed = pack(moving, dims, all_replicated ? 1 : m, layout.zigzag);
  Tensor buffer =
      start(all_replicated ? Collective::all_gather : Collective::all_to_all, packed, group).wait();
  std::vector<c10::SymInt> sizes;
  for (size_t i = 0; i < moving.size(); ++i)
    for (int64_t dim = 0; dim < 4; ++dim) {
      auto size = moving[i].sym_size(dim);
      if (dim == 3) size = size * m;
      if (dim == dims[i]) size = layout.zigzag && dim == 2 ? ceil_div(size, 2 * m) * 2 : ceil_div(size, m);
      sizes.push_back(size);
    }
  auto moved = unpack(buffer, sizes, std::vector<int64_t>(moving.size(), 3), m, false);
  size_t next = 0;
  for (size_t i = 0; i < xs.size(); ++i)
    if (moves[i] != Move::keep) xs[i] = moved[next++];
  return xs;
}

// O (B, H, rows or batches of this rank, d) -> this rank's d-slice of all of them.
Tensor move_out(const Tensor& o, const Layout& layout, const Group& group) {
  if (layout.row.out == Move::keep || layout.m == 1) return o;
  Tensor packed = pack({o}, {3}, layout.m, false);
  Tensor buffer = start(Collective::all_to_all, packed, group).wait();
  auto whole =
      layout.row.out == Move::rows
          ? std::vector<c10::SymInt>{o.sym_size(0), o.sym_size(1), layout.L, o.sym_size(3) / layout.m}
          : std::vector<c10::SymInt>{layout.B, o.sym_size(1), o.sym_size(2), o.sym_size(3) / layout.m};
  return unpack(buffer, whole, {int64_t(layout.row.out)}, layout.m, layout.zigzag)[0];
}

// The part of a mask dim that piece `index` of `pieces` covers, padded at the end so that every piece is
// full.
Tensor mask_piece(const Tensor& mask, int64_t dim, const c10::SymInt& first, const c10::SymInt& count,
                  const c10::SymInt& padded) {
  if (mask.sym_size(dim) == 1) return mask;
  std::vector<c10::SymInt> pad(2 * (4 - dim), 0);
  pad.back() = padded - mask.sym_size(dim);
  // True = attend: a padded row that saw no key would send NaN into the gradients
  return at::constant_pad_nd_symint(mask, pad, mask.scalar_type() == at::kBool ? 1 : 0)
      .narrow_symint(dim, first, count);
}

using Core = std::function<Tensor(const Tensor& q, const Tensor& k, const Tensor& v, const Attend&)>;

// Runs `core` on the rows this rank holds, with its part of the mask and the global indices of its rows.
Tensor attend_local(const Tensor& q, const Tensor& k, const Tensor& v, Attend attend, const Place& place,
                    const Layout& layout, const Core& core) {
  const int64_t H = fixed_size(q, 1), m = layout.m;
  attend.origin[1] = H * place.head_group;
  if (attend.mask) {
    Tensor mask = *attend.mask;
    while (mask.dim() < 4) mask = mask.unsqueeze(0);
    mask = enter_replicated({mask}, place.groups, place.reduce_dtype)[0];
    if (fixed_size(mask, 1) != 1) mask = mask.narrow(1, H * place.head_group, H);
    if (layout.row.q == Move::batch && m > 1)
      mask = mask_piece(mask, 0, ceil_div(layout.B, m) * layout.j, ceil_div(layout.B, m),
                        ceil_div(layout.B, m) * m);
    attend.mask = mask;
  }
  if (layout.row.q == Move::batch && m > 1) attend.origin[0] = ceil_div(layout.B, m) * layout.j;
  auto runs = layout.row_runs();
  if (layout.row.q != Move::rows || m == 1) return core(q, k, v, attend);
  std::vector<Tensor> outs;
  c10::SymInt at_row(0), total = runs[0].second * int64_t(runs.size()) * m;
  for (const auto& [first, count] : runs) {
    Attend here = attend;
    if (here.causal) here.causal = *here.causal + first;
    here.origin[2] = first;
    if (here.mask) here.mask = mask_piece(*here.mask, 2, first, count, total);
    outs.push_back(core(q.narrow_symint(2, at_row, count), k, v, here));
    at_row = at_row + count;
  }
  return outs.size() == 1 ? outs[0] : at::cat(outs, 2);
}

Layout layout_of(const Tensor& q, const Tensor& k, const Output& output, const Place& place) {
  const int64_t d = fixed_size(output.weight, 2) * (output.concat ? 1 : place.grid.slices);
  return Layout(place, output.batch, output.length, k.sym_size(2), fixed_size(q, 1), fixed_size(k, 1), d, q);
}

Tensor combine(const Tensor& o, const Output& output, const Place& place) {
  Tensor y;
  if (output.concat) {
    Tensor whole =
        hierarchical_all_gather(o, 1, 3, place.groups, /*slices_first=*/false, /*replicated=*/true);
    y = out_projection(whole, output.weight, output.bias);
  } else if (place.grid.size() == 1) {
    y = out_projection(o, output.weight, output.bias);
  } else {
    y = reduce_replicated(out_projection(o, output.weight, std::nullopt), place.groups, place.reduce_dtype);
    if (output.bias) y = y + output.bias->to(y.scalar_type());
  }
  return output.batch_first ? y : y.transpose(0, 1).contiguous();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> enter(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const QkvWeights& weights, const ExtraKeys& extra,
                                         const Place& place, bool batch_first) {
  std::vector<Tensor> inputs{query};
  const bool own_key = !key.is_same(query), own_value = !value.is_same(query) && !value.is_same(key);
  if (own_key) inputs.push_back(key);
  if (own_value) inputs.push_back(value);
  inputs = enter_replicated(inputs, place.groups, place.reduce_dtype);
  const Tensor& x_key = inputs[own_key ? 1 : 0];
  const Tensor& x_value = own_value ? inputs.back() : value.is_same(query) ? inputs[0] : x_key;
  auto [q, k, v] = qkv_projection(inputs[0], x_key, x_value, weights, batch_first);
  auto with_extra = [&](const Tensor& x, const std::optional<Tensor>& bias) {
    std::vector<Tensor> rows{x};
    auto one = [&](const Tensor& row) {
      return row.to(x.scalar_type())
          .unsqueeze(1)
          .unsqueeze(0)
          .expand_symint({x.sym_size(0), x.sym_size(1), 1, x.sym_size(3)});
    };
    if (bias) rows.push_back(one(*bias));
    if (extra.zero) rows.push_back(one(at::zeros({fixed_size(x, 1), fixed_size(x, 3)}, x.options())));
    return rows.size() == 1 ? x : at::cat(rows, 2);
  };
  k = with_extra(k, extra.bias_k);
  v = with_extra(v, extra.bias_v);
  Layout layout(place, q.sym_size(0), q.sym_size(2), k.sym_size(2), fixed_size(q, 1), fixed_size(k, 1),
                fixed_size(q, 3) * place.grid.slices, q);
  auto moved = move_in({q, k, v}, {layout.row.q, layout.row.k, layout.row.v}, layout, place.groups.slice);
  return {moved[0], moved[1], moved[2]};
}

Tensor leave(const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend, const Output& output,
             const Place& place) {
  Layout layout = layout_of(q, k, output, place);
  Tensor o = attend_local(q, k, v, attend, place, layout,
                          [](const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend) {
                            return std::get<0>(partial_attention(q, k, v, attend));
                          });
  return combine(move_out(o, layout, place.groups.slice), output, place);
}

std::tuple<Tensor, Tensor> leave_with_weights(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const Attend& attend, const Output& output, const Place& place,
                                              bool average) {
  Layout layout = layout_of(q, k, output, place);
  std::vector<Tensor> weights;
  Tensor o = attend_local(q, k, v, attend, place, layout,
                          [&](const Tensor& q, const Tensor& k, const Tensor& v, const Attend& attend) {
                            auto [out, w] = attention_with_weights(q, k, v, attend);
                            weights.push_back(w);
                            return out;
                          });
  Tensor local = weights.size() == 1 ? weights[0] : at::cat(weights, 2);
  Tensor y = combine(move_out(o, layout, place.groups.slice), output, place);
  return {y, gather_weights(local, layout.row, place, layout.B, layout.L, layout.zigzag, average)};
}

}  // namespace two_level_mha
