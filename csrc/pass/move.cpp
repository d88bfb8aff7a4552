#include "move.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include "../attend/merge.h"
#include "../base/sizes.h"
#include "../comm/pack.h"

namespace two_level_mha {

Tensor shard(const Tensor& x, const Context& context, double fill) {
  const int64_t dim = context.sharded_dim();
  if (dim < 0) return x;
  auto runs = context.runs(x.sym_size(dim));
  auto padded = runs[0].second * int64_t(runs.size()) * context.sizes.m;
  Tensor whole = pad_dim(x, dim, 0, padded - x.sym_size(dim), fill);
  std::vector<Tensor> parts;
  for (const auto& [first, count] : runs) parts.push_back(whole.narrow_symint(dim, first, count));
  return parts.size() == 1 ? parts[0] : at::cat(parts, dim);
}

Tensor positions_of(const Turn& turn, const c10::SymInt& first, const c10::SymInt& count,
                    const Tensor& like) {
  const Tensor number =
      at::arange(c10::Scalar(first), c10::Scalar(first + count), like.options().dtype(at::kLong));
  return number.div(turn.run, "floor") * turn.cycle + number.remainder(turn.run) + turn.first;
}

Tensor own_positions(const Tensor& x, int64_t dim, const c10::SymInt& first, const Context& context) {
  const Turn& turn = context.turn;
  if (turn.run == 1)
    return x.slice_symint(dim, turn.position(turn.before(first)) - first, std::nullopt, turn.cycle);
  if (turn.run == 0) return x.narrow(dim, 0, 0);
  const auto end = first + x.sym_size(dim);
  return x.index_select(
      dim, positions_of(turn, turn.before(first), turn.between(first, end), x) - c10::Scalar(first));
}

namespace {

// The same as by_owner for shares that are not equal: as many rows for each rank, those that it has no use for
// repeated.
Tensor by_share(const Tensor& x, const c10::SymInt& position, const Context& context) {
  const auto& s = context.sizes;
  const auto length = x.sym_size(2), rows = s.cycle.rows(position, length, s.m);
  std::vector<Tensor> places;
  for (int64_t rank = 0; rank < s.m; ++rank) {
    const Turn turn = turn_of(context.shares, s.m, rank);
    places.push_back(turn.run == 0
                         ? at::zeros_symint({rows}, x.options().dtype(at::kLong))
                         : positions_of(turn, turn.before(position), rows, x) - c10::Scalar(position));
  }
  return x.index_select(2, at::cat(places).clamp_max(c10::Scalar(length - 1)));
}

// Rows in the order that makes those of rank t a chunk: position
// % m, then position / m; zeros where a rank has a row less.
Tensor by_owner(const Tensor& x, const c10::SymInt& position, int64_t m) {
  auto before = position % m;
  auto rows = ceil_div(before + x.sym_size(2), m);
  Tensor padded = pad_dim(x, 2, before, rows * m - before - x.sym_size(2));
  return padded.unflatten_symint(2, {rows, c10::SymInt(m)}).transpose(2, 3).flatten(2, 3);
}

// What these made this rank receive, without the padding.
Tensor without_padding(const Tensor& x, const Context& context) {
  const auto& s = context.sizes;
  const bool skip = context.shares.empty() && (s.position % s.m) > context.slice;
  return x.narrow_symint(2, int64_t(skip), context.turn.between(s.position, s.position + s.moved_keys()));
}

int64_t pack_dim(Move move) {
  switch (move) {
    case Move::replicate:
    case Move::one_head:
      return -1;
    case Move::batch:
      return 0;
    case Move::heads:
      return 1;
    default:
      return 2;
  }
}

// O's split dim as a rank has it of an exchange: heads / m, or columns that are filled up.
int64_t split_size(const Tensor& o, const Context& context) {
  return context.sizes.whole_heads ? fixed_size(o, 1) / context.sizes.m : context.sizes.width();
}

// The same without what columns were filled up with.
Tensor own_columns(const Tensor& o, const Context& context) {
  const int64_t count = context.columns().count;
  return context.sizes.whole_heads || count == fixed_size(o, 3) ? o : o.narrow(3, 0, count);
}

}  // namespace

Tensor filled(const Tensor& x, int64_t dim, const Context& context) {
  return pad_dim(x, dim, 0, context.sizes.width() - context.columns().count);
}

Later<std::vector<Tensor>> begin_move_in(const std::vector<Tensor>& qkv, const Context& context) {
  const int64_t m = context.sizes.m;
  const std::array<Move, 3> moves{context.row.q, context.row.k, context.row.v};
  std::vector<Tensor> xs = qkv, moving;
  std::vector<int64_t> dims, gathered;
  bool all_replicated = true;
  for (size_t i = 0; i < xs.size(); ++i) {
    if (moves[i] == Move::keep || m == 1) continue;
    dims.push_back(pack_dim(moves[i]));
    gathered.push_back(i == 0 ? context.split_dim() : 3);
    const Tensor x = gathered.back() == 3 ? filled(xs[i], 3, context) : xs[i];
    moving.push_back(moves[i] != Move::cyclic ? x
                     : context.shares.empty() ? by_owner(x, context.sizes.position, m)
                                              : by_share(x, context.sizes.position, context));
    all_replicated &= pack_dim(moves[i]) < 0;
  }
  if (moving.empty()) return [=] { return xs; };
  Tensor packed = pack(moving, dims, all_replicated ? 1 : m, context.zigzag());
  auto coming =
      start(all_replicated ? Collective::all_gather : Collective::all_to_all, packed, context.groups.slice);
  std::vector<c10::SymInt> sizes;
  for (size_t i = 0; i < moving.size(); ++i)
    for (int64_t dim = 0; dim < 4; ++dim) {
      auto size = moving[i].sym_size(dim);
      if (dim == gathered[i]) size = dim == 3 ? c10::SymInt(context.sizes.d) : size * m;
      if (dim == dims[i]) size = shard_rows(size, m, context.zigzag() && dim == 2);
      sizes.push_back(size);
    }
  return [=] {
    auto moved = unpack(coming(), sizes, gathered, m, false), found = xs;
    size_t next = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      Tensor& x = found[i];
      if (moves[i] == Move::keep) continue;
      x = moved[next++];
      if (moves[i] == Move::cyclic) x = without_padding(x, context);
      if (moves[i] == Move::one_head) x = x.narrow(1, context.slice * fixed_size(x, 1) / m, 1);
    }
    return found;
  };
}

bool moves_out(const Context& context) {
  return context.sharded_dim() >= 0 && context.row.out != Move::keep;
}

Later<Tensor> begin_move_out(const Tensor& o, const Context& context) {
  if (!moves_out(context)) return [=] { return o; };
  const int64_t dim = context.sharded_dim(), m = context.sizes.m;
  auto coming =
      start(Collective::all_to_all, pack({o}, {context.split_dim()}, m, false), context.groups.slice);
  auto sizes = o.sym_sizes().vec();
  sizes[context.split_dim()] = split_size(o, context);
  sizes[dim] = dim == 0 ? context.sizes.B : context.sizes.L;
  return [=] { return own_columns(unpack(coming(), sizes, {dim}, m, context.zigzag())[0], context); };
}

Tensor merge_out(const Tensor& o, const Tensor& logsumexp, const Context& context) {
  const int64_t m = context.sizes.m;
  if (m == 1) return o;
  auto exchange = [&](const std::vector<Tensor>& xs, const std::vector<int64_t>& dims) {
    return start(Collective::all_to_all, pack(xs, dims, m, false), context.groups.slice)();
  };
  auto out_sizes = o.sym_sizes().vec();
  const int64_t held = split_size(o, context);
  const auto split = o.sym_numel() / out_sizes[context.split_dim()] * held;
  out_sizes[context.split_dim()] = held;
  std::vector<c10::SymInt> lse_sizes(out_sizes.begin(), out_sizes.begin() + 3);
  const int64_t lse_dim = context.split_dim() == 1 ? 1 : -1;
  auto parts = [&](const Tensor& buffer, std::vector<c10::SymInt> sizes) {
    sizes.insert(sizes.begin(), m);
    return buffer.reshape_symint(sizes);
  };
  Tensor lse = logsumexp.unsqueeze(3);
  if (lse.scalar_type() != o.scalar_type() && at::GradMode::is_enabled() && o.requires_grad())
    return own_columns(std::get<0>(merge_partials(parts(exchange({o}, {context.split_dim()}), out_sizes),
                                                  parts(exchange({lse}, {lse_dim}), lse_sizes))),
                       context);
  // One exchange: without gradients the logsumexp can travel as pairs of half-width numbers.
  auto bits = [](const Tensor& x, at::ScalarType dtype) {
    return x.scalar_type() == dtype ? x
                                    : x.view(dtype);  // view(dtype) has no gradient, even for the same one
  };
  Tensor buffer = exchange({o, bits(lse, o.scalar_type())}, {context.split_dim(), lse_dim});
  Tensor outs = buffer.narrow_symint(1, 0, split);
  Tensor lses = buffer.narrow_symint(1, split, buffer.sym_size(1) - split).contiguous();
  return own_columns(std::get<0>(merge_partials(parts(outs, out_sizes),
                                                parts(bits(lses, logsumexp.scalar_type()), lse_sizes))),
                     context);
}

}  // namespace two_level_mha
