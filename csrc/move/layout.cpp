#include "layout.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "../attend/merge.h"
#include "../plan.h"
#include "../sizes.h"
#include "pack.h"

namespace two_level_mha {

Layout::Layout(const Place& place, const CallShape& call, int64_t H, int64_t K, int64_t d, int64_t D,
               at::ScalarType dtype, bool cuda)
    : m(place.grid.slices), j(place.slice), head_dim(place.whole_heads ? 1 : 3), shape(call) {
  CallSizes<c10::SymInt> sizes{shape.batch,
                               shape.length,
                               shape.keys,
                               H,
                               K,
                               d,
                               m,
                               place.grid.head_groups,
                               D,
                               int64_t(c10::elementSize(dtype)),
                               place.causal,
                               place.concat,
                               place.whole_heads,
                               shape.position};
  scheme = resolve_scheme(place.scheme, sizes, profile_for(cuda));
  row = concrete_row(scheme, sizes);
  zigzag = deals_zigzag(row, place.causal);
}

int64_t Layout::dealt_dim() const {
  if (m == 1) return -1;
  return row.q == Move::batch ? 0 : row.q == Move::rows ? 2 : -1;
}

std::vector<std::pair<c10::SymInt, c10::SymInt>> Layout::runs() const {
  const int64_t dim = dealt_dim();
  if (dim < 0) return {{c10::SymInt(0), shape.length}};
  const c10::SymInt& size = dim == 0 ? shape.batch : shape.length;
  auto chunk = ceil_div(size, zigzag ? 2 * m : m);
  if (!zigzag) return {{chunk * j, chunk}};
  return {{chunk * j, chunk}, {chunk * (2 * m - 1 - j), chunk}};
}

c10::SymInt Layout::first_cyclic(const c10::SymInt& first) const {
  return (j + m - first % m) % m;
}

Tensor deal(const Tensor& x, const Layout& layout, double fill) {
  const int64_t dim = layout.dealt_dim();
  if (dim < 0) return x;
  auto runs = layout.runs();
  auto padded = runs[0].second * int64_t(runs.size()) * layout.m;
  Tensor whole = pad_dim(x, dim, 0, padded - x.sym_size(dim), fill);
  std::vector<Tensor> parts;
  for (const auto& [first, count] : runs) parts.push_back(whole.narrow_symint(dim, first, count));
  return parts.size() == 1 ? parts[0] : at::cat(parts, dim);
}

Tensor deal_cyclic(const Tensor& x, const Layout& layout) {
  return x.slice_symint(2, layout.first_cyclic(layout.shape.position), std::nullopt, layout.m);
}

namespace {

// Rows in the order that makes those of rank t a chunk: position % m, then position / m; zeros where a rank
// has a row less.
Tensor by_owner(const Tensor& x, const c10::SymInt& position, int64_t m) {
  auto before = position % m;
  auto rows = ceil_div(before + x.sym_size(2), m);
  Tensor padded = pad_dim(x, 2, before, rows * m - before - x.sym_size(2));
  return padded.unflatten_symint(2, {rows, c10::SymInt(m)}).transpose(2, 3).flatten(2, 3);
}

// What `by_owner` made this rank receive, without the padding.
Tensor without_padding(const Tensor& x, const Layout& layout) {
  const auto& [B, L, S, position] = layout.shape;
  const bool skip = (position % layout.m) > layout.j;
  return x.narrow_symint(2, int64_t(skip), (L - layout.first_cyclic(position) + (layout.m - 1)) / layout.m);
}

int64_t pack_dim(Move move) {
  switch (move) {
    case Move::replicate:
      return -1;
    case Move::batch:
      return 0;
    case Move::heads:
      return 1;
    default:
      return 2;
  }
}

}  // namespace

std::vector<Tensor> move_in(const std::vector<Tensor>& qkv, const Layout& layout, const Group& group) {
  const int64_t m = layout.m;
  const std::array<Move, 3> moves{layout.row.q, layout.row.k, layout.row.v};
  std::vector<Tensor> xs = qkv, moving;
  std::vector<int64_t> dims, gathered;
  bool all_replicated = true;
  for (size_t i = 0; i < xs.size(); ++i) {
    if (moves[i] == Move::keep || m == 1) continue;
    moving.push_back(moves[i] == Move::cyclic ? by_owner(xs[i], layout.shape.position, m) : xs[i]);
    dims.push_back(pack_dim(moves[i]));
    gathered.push_back(i == 0 ? layout.head_dim : 3);
    all_replicated &= moves[i] == Move::replicate;
  }
  if (moving.empty()) return xs;
  Tensor packed = pack(moving, dims, all_replicated ? 1 : m, layout.zigzag);
  Tensor buffer =
      start(all_replicated ? Collective::all_gather : Collective::all_to_all, packed, group).wait();
  std::vector<c10::SymInt> sizes;
  for (size_t i = 0; i < moving.size(); ++i)
    for (int64_t dim = 0; dim < 4; ++dim) {
      auto size = moving[i].sym_size(dim);
      if (dim == gathered[i]) size = size * m;
      if (dim == dims[i]) size = dealt_rows(size, m, layout.zigzag && dim == 2);
      sizes.push_back(size);
    }
  auto moved = unpack(buffer, sizes, gathered, m, false);
  size_t next = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    if (moves[i] == Move::keep) continue;
    xs[i] = moved[next++];
    if (moves[i] == Move::cyclic) xs[i] = without_padding(xs[i], layout);
  }
  return xs;
}

Tensor move_out(const Tensor& o, const Layout& layout, const Group& group) {
  const int64_t dim = layout.dealt_dim(), m = layout.m;
  if (dim < 0) return o;
  Tensor buffer = start(Collective::all_to_all, pack({o}, {layout.head_dim}, m, false), group).wait();
  auto sizes = o.sym_sizes().vec();
  sizes[layout.head_dim] = sizes[layout.head_dim] / m;
  sizes[dim] = dim == 0 ? layout.shape.batch : layout.shape.length;
  return unpack(buffer, sizes, {dim}, m, layout.zigzag)[0];
}

Tensor merge_out(const Tensor& o, const Tensor& logsumexp, const Layout& layout, const Group& group) {
  const int64_t m = layout.m;
  if (m == 1) return o;
  auto exchange = [&](const std::vector<Tensor>& xs, const std::vector<int64_t>& dims) {
    return start(Collective::all_to_all, pack(xs, dims, m, false), group).wait();
  };
  auto out_sizes = o.sym_sizes().vec();
  out_sizes[layout.head_dim] = out_sizes[layout.head_dim] / m;
  std::vector<c10::SymInt> lse_sizes(out_sizes.begin(), out_sizes.begin() + 3);
  const int64_t lse_dim = layout.head_dim == 1 ? 1 : -1;
  auto parts = [&](const Tensor& buffer, std::vector<c10::SymInt> sizes) {
    sizes.insert(sizes.begin(), m);
    return buffer.reshape_symint(sizes);
  };
  Tensor lse = logsumexp.unsqueeze(3);
  if (lse.scalar_type() != o.scalar_type() && at::GradMode::is_enabled() && o.requires_grad())
    return std::get<0>(merge_partials(parts(exchange({o}, {layout.head_dim}), out_sizes),
                                      parts(exchange({lse}, {lse_dim}), lse_sizes)));
  // One exchange: without gradients the logsumexp can travel as pairs of half-width numbers.
  auto bits = [](const Tensor& x, at::ScalarType dtype) {
    return x.scalar_type() == dtype ? x
                                    : x.view(dtype);  // view(dtype) has no gradient, even for the same one
  };
  Tensor buffer = exchange({o, bits(lse, o.scalar_type())}, {layout.head_dim, lse_dim});
  const auto split = o.sym_numel() / m;
  Tensor outs = buffer.narrow_symint(1, 0, split);
  Tensor lses = buffer.narrow_symint(1, split, buffer.sym_size(1) - split).contiguous();
  return std::get<0>(
      merge_partials(parts(outs, out_sizes), parts(bits(lses, logsumexp.scalar_type()), lse_sizes)));
}

}  // namespace two_level_mha
