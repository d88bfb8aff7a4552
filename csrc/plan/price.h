// What a call costs: work, traffic (traffic.h) and hardware (profiles.h) in seconds. scheme="auto", `plan`
// and the choice of a grid all decide by `price`. No torch.
#pragma once

#include <optional>
#include <utility>

#include "profiles.h"

namespace two_level_mha {

// What one rank computes in a forward pass.
template <class I>
struct Work {
  I attention, projections;  // FLOPs, 2 per multiply-add
  I read;                    // bytes of weights, keys and values read from memory
};

// Sizes of what one rank has when attention runs.
template <class I>
struct Local {
  I batch, rows, keys;      // of q; keys that its queries are compared with
  int64_t heads, kv_heads;  // that it attends with
  int64_t qk_width, v_width;
};

template <class I>
Local<I> local_sizes(const SchemeRow& row, const CallSizes<I>& s) {
  Local<I> local{s.B, s.L, s.S, s.H, s.K, s.d, s.d};
  if (row.q == Move::batch) local.batch = ceil_div(s.B, s.m);
  if (row.q == Move::rows) local.rows = shard_rows(s.L, s.m, zigzag_rows(row, s.causal));
  if (row.k == Move::cyclic) local.keys = ceil_div(s.S, s.m);
  // queries that stay where they are projected: whole heads of this rank, or slices as heads
  if (row.q == Move::keep && row.storage == Storage::whole_heads) local.heads = s.H / s.m;
  if (row.q == Move::keep && row.storage == Storage::slices) local.qk_width = s.d / s.m;
  if (row.k == Move::heads) local.kv_heads = s.K / s.m;
  if (row.k == Move::one_head) local.kv_heads = 1;
  if (row.v == Move::keep) local.v_width = s.d / s.m;
  return local;
}

// A causal call is taken to see half of the keys that are
// not before its first query; other masks are not seen.
template <class I>
Work<I> forward_work(Scheme scheme, const CallSizes<I>& s) {
  const SchemeRow row = concrete_row(scheme, s);
  const Local<I> local = local_sizes(row, s);
  const int64_t width = row.w == Move::replicate ? s.d : s.d / s.m;
  const int64_t out_width = s.concat ? s.n * s.H * s.d : s.H * width;
  Work<I> work{I(0), I(0), I(0)};
  const I seen =
      s.causal ? local.keys - ceil_div(s.S - s.position, 2 * (row.k == Move::cyclic ? s.m : 1)) : local.keys;
  work.attention = local.batch * local.rows * seen * (2 * local.heads * (local.qk_width + local.v_width));
  work.projections = traffic::tokens(row.x, s.L, s) * (2 * s.D * s.H * width) +
                     traffic::tokens(row.x, s.given_keys(), s) * (2 * (s.kdim() + s.vdim()) * s.K * width) +
                     traffic::tokens(row.y, s.L, s) * (2 * s.D * out_width);
  const int64_t weights = width * (s.D * s.H + (s.kdim() + s.vdim()) * s.K) + s.D * out_width;
  work.read =
      local.batch * local.keys * (local.kv_heads * (local.qk_width + local.v_width) * s.element_size) +
      weights * s.element_size;
  return work;
}

// FLOPs that take as long at `flops` as `work` does at `rate`, in an integer ratio.
template <class I>
I at_rate(const I& work, int64_t flops, int64_t rate) {
  constexpr int64_t kParts = 1024;
  return flops == rate ? work : work / kParts * int64_t(double(flops) / double(rate) * kParts);
}

// Durations in FLOPs of the same duration, so that SymInts stay integers: divided by profile.flops they are
// seconds. Nothing is taken to overlap.
template <class I>
struct Price {
  I compute, memory, sending, latency;
  I total() const { return compute + memory + sending + latency; }
};

template <class I>
Price<I> price(Scheme scheme, const CallSizes<I>& s, const Rates& profile) {
  const Work<I> work = forward_work(scheme, s);
  const Local<I> local = local_sizes(concrete_row(scheme, s), s);
  const int64_t widest = std::max(local.qk_width, local.v_width);
  I attention = work.attention;
  if (s.element_size == 2 && s.d <= profile.equal)
    attention = attention / (local.qk_width + local.v_width) * (2 * widest);
  const I compute = at_rate(attention, profile.flops, profile.attention(s.element_size, widest)) +
                    at_rate(work.projections, profile.flops, profile.projections(s.element_size));
  Price<I> price{compute, work.read * (profile.flops / profile.memory), I(0), I(0)};
  int64_t collectives = 0;
  for (const Sent<I>& row : forward_traffic(scheme, s)) {
    price.sending =
        price.sending + (row.bytes + row.biases) * (profile.flops / profile.bandwidth(row.axis, s.n, s.m));
    collectives += row.collectives;
  }
  price.latency = I(collectives * (profile.flops / 1'000'000'000 * profile.latency));
  return price;
}

// The scheme with the smallest price among those that may be chosen per call; the earlier row wins a tie.
// What is stored as whole heads runs as `heads`.
template <class I>
Scheme resolve_scheme(Scheme requested, const CallSizes<I>& sizes, const Rates& profile) {
  if (requested != Scheme::automatic) return requested;
  if (sizes.whole_heads) return Scheme::heads;
  if (sizes.m == 1) return Scheme::slices;
  std::optional<std::pair<I, Scheme>> best;
  for (const SchemeRow& row : kSchemes) {
    if (!row.automatic) continue;
    I found = price(row.scheme, sizes, profile).total();
    if (!best || found < best->first) best = {found, row.scheme};
  }
  return best->second;
}

}  // namespace two_level_mha
