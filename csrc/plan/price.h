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
  I out;                     // of the projections, the output's
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
  if (row.k == Move::cyclic) local.keys = s.cycle.share(s.S, s.m);
  // queries that stay where they are projected: whole heads of this rank, or slices as heads
  if (row.q == Move::keep && row.storage == Storage::whole_heads) local.heads = s.H / s.m;
  if (row.q == Move::keep && row.storage == Storage::slices) local.qk_width = s.width();
  if (row.k == Move::heads) local.kv_heads = s.K / s.m;
  if (row.k == Move::one_head) local.kv_heads = 1;
  if (row.v == Move::keep) local.v_width = s.width();
  if (traffic::on_latents(row.scheme, s)) {  // all heads against one, of latents that are values too
    local.keys = s.cycle.share(s.S, s.n * s.m);
    local.heads = s.n * s.H;
    local.kv_heads = 1;
    local.qk_width = s.latent.rank + s.latent.rope;
    local.v_width = s.latent.rank;
  }
  return local;
}

// A causal call is taken to see half of the keys that are
// not before its first query; other masks are not seen.
template <class I>
Work<I> forward_work(Scheme scheme, const CallSizes<I>& s) {
  const SchemeRow row = concrete_row(scheme, s);
  const Local<I> local = local_sizes(row, s);
  // features of the projections: of all slices, or of this rank's
  const bool all = row.w == Move::replicate;
  const int64_t q_width = all ? s.q_heads() * s.d : s.query_row(s.q_heads());
  const int64_t kv_width = s.K * (all ? s.d : s.width());
  const int64_t out_width = s.concat ? s.n * s.H * s.d : all ? s.H * s.d : s.query_row(s.H);
  Work<I> work{I(0), I(0), I(0), I(0)};
  const auto& latent = s.latent;
  const I latents = s.B * s.L * (2 * s.ydim() * latent.whole());
  if (traffic::on_latents(scheme, s)) {
    const int64_t into = s.H * latent.head_weights(s.m, s.D);
    const int64_t out = s.H * slice_width(latent.value, s.m) * s.ydim();
    work.attention =
        local.batch * local.rows * local.keys * (2 * local.heads * (local.qk_width + local.v_width));
    work.out = s.B * s.L * (2 * out);
    work.projections = latents + s.B * s.L * (2 * into) + work.out;
    work.read = local.batch * local.keys * (local.qk_width * s.element_size) +
                (into + out + s.ydim() * latent.whole()) * s.element_size;
    return work;
  }
  const I added = row.k == Move::cyclic ? s.cycle.share(s.S - s.position, s.m) : s.S - s.position;
  const I seen = s.causal ? local.keys - ceil_div(added, 2) : local.keys;
  work.attention = local.batch * local.rows * seen * (2 * local.heads * (local.qk_width + local.v_width));
  work.out = traffic::tokens(row.y, s.L, s) * (2 * s.ydim() * out_width);
  work.projections = traffic::tokens(row.x, s.L, s) * (2 * s.D * q_width) +
                     traffic::tokens(row.x, s.given_keys(), s) * (2 * (s.kdim() + s.vdim()) * kv_width) +
                     latents + work.out;
  const int64_t weights =
      s.D * q_width + (s.kdim() + s.vdim()) * kv_width + s.ydim() * (out_width + latent.whole());
  work.read =
      local.batch * local.keys * (local.kv_heads * (local.qk_width + local.v_width) * s.element_size) +
      weights * s.element_size;
  return work;
}

// FLOPs that take as long at `flops` as `work` does at `rate`, in an integer ratio.
template <class I>
I at_rate(const I& work, int64_t flops, int64_t rate) {
  constexpr int64_t kParts = 1024;
  // times slower: beyond it nothing is chosen, and the product would not be an int64_t
  constexpr double kMost = 1e12;
  return flops == rate ? work
                       : work / kParts * int64_t(std::min(kMost, double(flops) / double(rate)) * kParts);
}

// Durations in FLOPs of the same duration, so that SymInts stay integers: divided by profile.flops they are
// seconds.
template <class I>
struct Price {
  I compute, memory, sending, latency;
  I hidden;            // of sending, what runs beside computing
  int64_t chunks = 1;  // of the batch
  I total() const { return compute + memory + sending + latency - hidden; }
};

// Of two that take turns in chunks, what runs beside the other: n chunks take c / n, then n - 1 times the longer of both
// c / n and x / n, then x / n.
template <class I>
I beside(const I& computing, const I& sending, int64_t chunks) {
  const I& shorter = computing < sending ? computing : sending;
  return shorter / chunks * (chunks - 1);
}

template <class I>
Price<I> price_in_chunks(Scheme scheme, const CallSizes<I>& s, const Rates& profile) {
  const Work<I> work = forward_work(scheme, s);
  const SchemeRow row = concrete_row(scheme, s);
  const Local<I> local = local_sizes(row, s);
  const int64_t widest = std::max(local.qk_width, local.v_width);
  I attention = work.attention;
  if (s.element_size == 2 && std::max(s.d, local.qk_width) <= profile.equal)
    attention = attention / (local.qk_width + local.v_width) * (2 * widest);
  auto projecting = [&](const I& flops) {
    return at_rate(flops, profile.flops, profile.projections(s.element_size));
  };
  const I entering = projecting(work.projections - work.out);
  const I leaving =
      at_rate(attention, profile.flops, profile.attention(s.element_size, widest)) + projecting(work.out);
  Price<I> price{entering + leaving, work.read * (profile.flops / profile.memory), I(0), I(0), I(0)};
  int64_t collectives = 0;
  I sent_in(0), sent_out(0);
  for (const Sent<I>& sent : forward_traffic(scheme, s)) {
    I& sending = sent.enters ? sent_in : sent_out;
    sending = sending + (sent.bytes + sent.biases) * (profile.flops / profile.bandwidth(sent.axis, s.n, s.m));
    collectives += sent.collectives;
  }
  price.sending = sent_in + sent_out;
  price.latency = I(collectives * (profile.flops / 1'000'000'000 * profile.latency));
  const Chunking in = enter_chunks(row, s), out = leave_chunks(row, s);
  price.chunks = std::max(in.count, out.count);
  if (price.chunks > 1) {
    const bool in_halves = s.in_halves || in.count != out.count;
    const I hidden = in_halves ? beside(entering, sent_in, in.count) + beside(leaving, sent_out, out.count)
                               : beside(price.compute, price.sending, in.count);
    price.hidden = hidden / 100 * profile.hidden;
  }
  return price;
}

// Whether a call could gain by chunks at all.
template <class I>
bool may_overlap(Scheme scheme, CallSizes<I> s, const Rates& profile) {
  s.overlap = 2;
  return profile.hidden > 0 && enter_chunks(concrete_row(scheme, s), s).count > 1;
}

// In as many chunks as are asked for, or as are predicted to be the fastest: more of them hide more, and begin more
// exchanges, so that the first number which does not gain ends the search.
template <class I>
Price<I> price(Scheme scheme, const CallSizes<I>& s, const Rates& profile) {
  constexpr int64_t kMostPredicted = 16;
  CallSizes<I> chunked = s;
  chunked.overlap = std::max<int64_t>(1, s.overlap);
  Price<I> best = price_in_chunks(scheme, chunked, profile);
  if (s.overlap != 0 || !may_overlap(scheme, s, profile)) return best;
  for (int64_t count = 2; count <= kMostPredicted; count *= 2) {
    chunked.overlap = count;
    if (enter_chunks(concrete_row(scheme, s), chunked).count != count) break;
    Price<I> found = price_in_chunks(scheme, chunked, profile);
    if (!(found.total() < best.total())) break;
    best = found;
  }
  return best;
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
