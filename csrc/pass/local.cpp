#include "local.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>

#include <limits>

#include "../base/sizes.h"
#include "../comm/replicated.h"
#include "move.h"

namespace two_level_mha {

namespace {

// Of the whole call, so that all ranks refuse a mask alike.
void check_mask(const Tensor& mask, const c10::SymInt& heads, const c10::SymInt& keys,
                const Context& context) {
  const std::array<c10::SymInt, 4> full{context.sizes.B, heads, context.sizes.L, keys};
  bool fits = mask.dim() == 4;
  for (int64_t dim = 0; fits && dim < 4; ++dim)
    fits = mask.sym_size(dim) == 1 || mask.sym_size(dim) == full[dim];
  check_mask_dtype(mask);
  TORCH_CHECK_VALUE(fits, "attn_mask must be broadcastable to (B, h, L, S) = (", full[0], ", ", full[1], ", ",
                    full[2], ", ", full[3], "), got ", mask.sym_sizes());
}

// The heads, sequences and keys of the mask that this rank attends to; its rows stay whole.
Tensor local_mask(Tensor mask, const c10::SymInt& first_head, int64_t heads, const Context& context) {
  if (fixed_size(mask, 1) != 1) mask = mask.narrow_symint(1, first_head, heads);
  if (context.row.k == Move::cyclic && context.sizes.m > 1 && mask.sym_size(3) != 1)
    mask = own_positions(mask, 3, context.first_key, context);
  const int64_t dim = context.sharded_dim();
  if (dim < 0 || mask.sym_size(dim) == 1) return mask;
  // True = attend: a padded row that saw no key would send NaN into the gradients
  return shard(mask, context, mask.scalar_type() == at::kBool ? 1 : 0);
}

// What is added to the scores before the mask (B, H, L, S), which may be absent, as a mask; both of this rank.
Tensor with_scores(const Tensor& scores, const std::optional<Tensor>& mask, const Tensor& q,
                   const Tensor& k) {
  const std::array<c10::SymInt, 4> full{q.sym_size(0), q.sym_size(1), q.sym_size(2), k.sym_size(2)};
  const auto dtype = scores.scalar_type();
  const bool wide =
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  bool fits = scores.dim() == 4 && wide && scores.device() == q.device();
  for (int64_t dim = 0; fits && dim < 4; ++dim)
    fits = scores.sym_size(dim) == 1 || scores.sym_size(dim) == full[dim];
  TORCH_CHECK_VALUE(
      fits, "scores must be float64, float32, bfloat16 or float16 and broadcastable to (B, H, L, S) = (",
      full[0], ", ", full[1], ", ", full[2], ", ", full[3], ") on ", q.device(),
      ", as q and k lie on this rank, got ", dtype, " ", scores.sym_sizes(), " on ", scores.device());
  if (!mask) return scores;
  if (mask->scalar_type() != at::kBool) return scores + *mask;
  return scores.masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity());
}

// Whether the call has one row, which sees every key that it is given.
bool sees_all(const Attend& attend, const Context& context) {
  if (!attend.causal) return true;
  if (known(context.sizes.L) != 1 || *attend.causal + 1 < context.sizes.S) return false;
  return !attend.window || !(context.first_key + *attend.window < *attend.causal + 1);
}

// Rows whose keys are told by a mask at a time.
constexpr int64_t kMaskedRows = 512;

// Which of k's keys, at `positions`, the rows from `first` on see, and what the call's mask (.., L or 1, S or 1) says of
// them.
Tensor seen_at(const Tensor& positions, const c10::SymInt& first, const c10::SymInt& rows,
               const Attend& attend) {
  const Tensor last =
      at::arange(c10::Scalar(first), c10::Scalar(first + rows), positions.options()).unsqueeze(1) +
      c10::Scalar(*attend.causal);
  Tensor seen = positions <= last;
  if (attend.window) seen = seen.logical_and(positions > last - c10::Scalar(*attend.window));
  seen = seen.unsqueeze(0).unsqueeze(0);
  if (!attend.mask) return seen;
  Tensor mask = *attend.mask;
  if (mask.sym_size(2) != 1) mask = mask.narrow_symint(2, first, rows);
  if (mask.sym_size(3) != 1) mask = mask.narrow_symint(3, 0, positions.sym_size(0));
  if (mask.scalar_type() == at::kBool) return mask.logical_and(seen);
  return mask.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity());
}

// Keys that are this rank's turn are as far apart as a cycle is long, as a kernel takes them, or if its run has several
// not equally far: then a mask says which of them a row sees.
std::tuple<Tensor, Tensor> attend_in_turn(const Tensor& q, const Tensor& k, const Tensor& v, Attend attend,
                                          const Context& context, const Core& core) {
  const Turn& turn = context.turn;
  const auto number = turn.before(context.first_key), length = context.sizes.L;
  attend.key_stride = turn.cycle;
  if (turn.run == 1) {
    if (attend.causal) attend.causal = *attend.causal - turn.position(number);
    return core(q, k, v, attend);
  }
  Attend masked = attend;
  masked.causal = masked.window = std::nullopt;
  if (turn.run == 0 || sees_all(attend, context)) return core(q, k, v, masked);
  const Tensor positions = positions_of(turn, number, k.sym_size(2), k);
  const int64_t blocks = ceil_div(known(length).value_or(1), kMaskedRows);
  std::vector<Tensor> outs, logsumexps;
  for (int64_t block = 0; block < blocks; ++block) {
    const bool is_last = block + 1 == blocks;
    const c10::SymInt first = block * kMaskedRows, rows = is_last ? length - first : c10::SymInt(kMaskedRows);
    // the last row sees what was given to the call; one before it nothing behind its own position
    const auto until = turn.before(*attend.causal + first + rows) - number;
    const auto keys = is_last ? k.sym_size(2) : until.max(0).min(k.sym_size(2));
    masked.mask = seen_at(positions.narrow_symint(0, 0, keys), first, rows, attend);
    auto [out, logsumexp] = core(q.narrow_symint(2, first, rows), k.narrow_symint(2, 0, keys),
                                 v.narrow_symint(2, 0, keys), masked);
    outs.push_back(out);
    logsumexps.push_back(logsumexp);
  }
  if (blocks == 1) return {outs[0], logsumexps[0]};
  return {at::cat(outs, 2), at::cat(logsumexps, 2)};
}

}  // namespace

Tensor whole_mask(Tensor mask, const Context& context) {
  const CallSizes<c10::SymInt>& s = context.sizes;
  while (mask.dim() < 4) mask = mask.unsqueeze(0);
  check_mask(mask, s.H * s.n, s.S - context.first_key, context);
  return enter_replicated({mask}, over_grid(context.groups), context.reduce_dtype)[0];
}

int64_t first_head(int64_t heads, const Context& context) {
  const bool own_heads = context.row.q == Move::keep && context.row.storage == Storage::whole_heads;
  return heads * (own_heads ? context.head_group * context.sizes.m + context.slice : context.head_group);
}

std::tuple<Tensor, Tensor> attend_local(const Tensor& q, const Tensor& k, const Tensor& v, Attend attend,
                                        const std::optional<Tensor>& scores, const Context& context,
                                        const Core& core) {
  const CallSizes<c10::SymInt>& s = context.sizes;
  attend = in_range(attend);
  const int64_t H = fixed_size(q, 1);  // of this rank
  attend.origin[1] = first_head(H, context);
  if (attend.mask) attend.mask = local_mask(*attend.mask, attend.origin[1], H, context);
  if (scores) attend.mask = with_scores(*scores, attend.mask, q, k);
  const int64_t dim = context.sharded_dim();
  attend.origin[0] = context.first_sequence;
  if (dim == 0) attend.origin[0] = attend.origin[0] + context.runs(s.B)[0].first;
  if (context.row.k == Move::cyclic) return attend_in_turn(q, k, v, attend, context, core);
  if (attend.causal) attend.causal = *attend.causal - context.first_key;
  if (dim != 2) return core(q, k, v, attend);
  std::vector<Tensor> outs, seconds;
  c10::SymInt at_row(0);
  for (const auto& [first, count] : context.runs(s.L)) {
    Attend here = attend;
    if (here.causal) here.causal = *here.causal + first;
    here.origin[2] = first;
    if (here.mask && here.mask->sym_size(2) != 1) here.mask = here.mask->narrow_symint(2, at_row, count);
    auto [out, second] = core(q.narrow_symint(2, at_row, count), k, v, here);
    outs.push_back(out);
    seconds.push_back(second);
    at_row = at_row + count;
  }
  if (outs.size() == 1) return {outs[0], seconds[0]};
  return {at::cat(outs, 2), at::cat(seconds, 2)};
}

}  // namespace two_level_mha
