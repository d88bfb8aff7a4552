// What a call costs on a grid, and which grid and scheme to take: work, traffic (traffic.h) and hardware
// (profiles.h) in seconds. scheme="auto", `plan` and the choice of a grid all decide by `price`. No torch.
#pragma once

#include "grid.h"
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
Local<I> local_sizes(Scheme scheme, const SchemeRow& row, const CallSizes<I>& s) {
  Local<I> local{s.B, s.L, s.S, s.H, s.K, s.d, s.d};
  if (row.q == Move::batch) local.batch = ceil_div(s.B, s.m);
  if (row.q == Move::rows) local.rows = dealt_rows(s.L, s.m, deals_zigzag(row, s.causal));
  if (row.k == Move::cyclic) local.keys = ceil_div(s.S, s.m);
  if (scheme == Scheme::heads) {
    local.heads = s.H / s.m;
    local.kv_heads = s.K % s.m == 0 ? s.K / s.m : 1;
  }
  if (scheme == Scheme::independent) local.qk_width = s.d / s.m;
  if (row.v == Move::keep) local.v_width = s.d / s.m;
  return local;
}

// A causal call is taken to see half of the keys that are not before its first query; other masks are not
// seen.
template <class I>
Work<I> forward_work(Scheme scheme, const CallSizes<I>& s) {
  const SchemeRow row = concrete_row(scheme, s);
  const Local<I> local = local_sizes(scheme, row, s);
  const bool by_tokens = scheme == Scheme::weights && s.m > 1;
  const int64_t width = by_tokens ? s.d : s.d / s.m, out_width = s.concat ? s.n * s.H * s.d : s.H * width;
  auto tokens = [&](const I& length) -> I {
    return by_tokens ? traffic::tokens(row, length, s) : s.B * length;
  };
  // with concat every rank combines all tokens
  const I combined = s.concat ? s.B * s.L : tokens(s.L);
  Work<I> work{I(0), I(0), I(0)};
  const I seen =
      s.causal ? local.keys - ceil_div(s.S - s.position, 2 * (row.k == Move::cyclic ? s.m : 1)) : local.keys;
  work.attention = local.batch * local.rows * seen * (2 * local.heads * (local.qk_width + local.v_width));
  work.projections = tokens(s.L) * (2 * s.D * s.H * width) +
                     tokens(s.given_keys()) * (2 * (s.kdim() + s.vdim()) * s.K * width) +
                     combined * (2 * s.D * out_width);
  const int64_t weights = width * (s.D * s.H + (s.kdim() + s.vdim()) * s.K) + s.D * out_width;
  work.read =
      local.batch * local.keys * (local.kv_heads * (local.qk_width + local.v_width) * s.element_size) +
      weights * s.element_size;
  return work;
}

// Durations in FLOPs of the same duration, so that SymInts stay integers: divided by profile.flops they are
// seconds. Nothing is taken to overlap.
template <class I>
struct Price {
  I compute, memory, sending, latency;
  I total() const { return compute + memory + sending + latency; }
};

template <class I>
Price<I> price(Scheme scheme, const CallSizes<I>& s, const Profile& profile) {
  const Work<I> work = forward_work(scheme, s);
  I attention = work.attention;
  if (s.element_size == 2 && s.d <= profile.equal) {
    const Local<I> local = local_sizes(scheme, concrete_row(scheme, s), s);
    const int64_t widest = std::max(local.qk_width, local.v_width);
    attention = attention / (local.qk_width + local.v_width) * (2 * widest);
  }
  Price<I> price{attention + work.projections, work.read * (profile.flops / profile.memory), I(0), I(0)};
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
Scheme resolve_scheme(Scheme requested, const CallSizes<I>& sizes, const Profile& profile) {
  if (requested != Scheme::automatic) return requested;
  if (sizes.whole_heads) return Scheme::heads;
  if (sizes.m == 1) return Scheme::slices;
  Scheme best = Scheme::automatic;
  I best_price(0);
  for (const SchemeRow& row : kSchemes) {
    if (!row.automatic) continue;
    I found = price(row.scheme, sizes, profile).total();
    if (best == Scheme::automatic || found < best_price) best = row.scheme, best_price = found;
  }
  return best;
}

// Whether scheme="auto" stores the query side by whole heads: where heads share keys and values, it then
// leaves the queries where they are projected.
inline bool stores_whole_heads(const Heads& heads, const Grid& grid) {
  return heads.num_kv_heads < heads.num_heads &&
         whole_heads_fit(heads.num_heads / grid.head_groups, heads.num_kv_heads / grid.head_groups,
                         grid.slices);
}

// Bytes that one rank holds.
struct Memory {
  int64_t weights;      // of the layer
  int64_t activations;  // that a forward pass keeps for the backward pass
  int64_t cache;        // keys and values of all S positions
};

inline Memory memory_of(Scheme scheme, const CallSizes<int64_t>& s) {
  const SchemeRow row = concrete_row(scheme, s);
  const Local<int64_t> local = local_sizes(scheme, row, s);
  const int64_t E = s.d / s.m, h = s.n * s.H;
  const bool by_tokens = scheme == Scheme::weights && s.m > 1;
  const int64_t projections = E * (s.D * s.H + (s.kdim() + s.vdim()) * s.K);
  const int64_t out = s.concat ? s.D * h * s.d : s.D * s.H * E;
  const int64_t biases = s.bias ? E * (s.H + 2 * s.K) + s.D : 0;
  Memory memory{projections + out + biases, 0, 0};

  memory.activations = traffic::input_elements(
      s, [&](int64_t length) { return by_tokens ? traffic::tokens(row, length, s) : s.B * length; });
  const int64_t queries = local.batch * local.heads * local.rows;
  const int64_t keys = s.position > 0 ? 0 : local.batch * local.kv_heads * local.keys;  // else the cache's
  memory.activations += (queries + keys) * (local.qk_width + local.v_width);
  if (s.concat)
    memory.activations += s.B * s.L * h * s.d;  // the concatenation
  else if (row.out != Move::keep && !by_tokens && s.m > 1)
    memory.activations += s.B * s.L * s.H * E;  // O as W_O takes it
  if (by_tokens) memory.activations += s.m * (projections + (s.concat ? 0 : out));
  const int64_t batch = scheme == Scheme::batch ? ceil_div(s.B, s.m) : s.B;
  const int64_t positions = scheme == Scheme::batch ? s.S : ceil_div(s.S, s.m);
  memory.cache = 2 * batch * positions * s.K * s.d;

  memory.weights *= s.element_size;
  memory.activations *= s.element_size;
  memory.activations += queries * std::max<int64_t>(4, s.element_size);  // logsumexp
  memory.cache *= s.element_size;
  return memory;
}

// A layer and a call of it, to be put on some number of ranks.
struct PlanRequest {
  int64_t ranks;
  Heads heads;
  int64_t D, B, L, S;  // embed dim; S: every key, with those of a cache
  int64_t element_size;
  bool cached, causal, concat,
      bias;  // cached: the L queries are the last of S positions, the others' keys are kept
};

// One line of a plan.
struct Option {
  Grid grid;
  Scheme scheme;
  CallSizes<int64_t> sizes;
  bool exact;
  bool automatic;  // what scheme="auto" takes on this grid
  Work<int64_t> work;
  Traffic<int64_t> forward, backward;
  Memory memory;
  Price<int64_t> price;
};

inline Option option_of(const PlanRequest& request, const Grid& grid, Scheme scheme, bool whole_heads,
                        const Profile& profile) {
  CallSizes<int64_t> s{request.B,
                       request.L,
                       request.S,
                       request.heads.num_heads / grid.head_groups,
                       request.heads.num_kv_heads / grid.head_groups,
                       request.heads.head_dim,
                       grid.slices,
                       grid.head_groups,
                       request.D,
                       request.element_size,
                       request.causal,
                       request.concat,
                       whole_heads,
                       request.cached ? request.S - request.L : 0};
  s.bias = request.bias;
  return {grid,
          scheme,
          s,
          scheme_row(scheme).exact,
          false,
          forward_work(scheme, s),
          forward_traffic(scheme, s),
          backward_traffic(scheme, s),
          memory_of(scheme, s),
          price(scheme, s, profile)};
}

// Every valid grid, most head groups first, with every scheme that can run the call on it: with keys in a
// cache its two layouts, else all the others. On a grid of one slice they are all the same, and one stands
// for them.
inline std::vector<Option> plan_options(const PlanRequest& request, const Profile& profile) {
  std::vector<Option> options;
  for (const Grid& grid : Grid::candidates(request.ranks, request.heads)) {
    const bool whole = stores_whole_heads(request.heads, grid), cached = request.cached;
    const bool heads_fit = whole_heads_fit(request.heads.num_heads / grid.head_groups,
                                           request.heads.num_kv_heads / grid.head_groups, grid.slices);
    const size_t first = options.size();
    for (const SchemeRow& row : kSchemes) {
      if (cached && row.scheme != Scheme::position && row.scheme != Scheme::batch) continue;
      if (!cached && row.scheme == Scheme::position) continue;
      if (row.storage == Storage::whole_heads && !heads_fit) continue;
      const bool stored_whole = row.storage == Storage::whole_heads || (cached && whole);
      options.push_back(option_of(request, grid, row.scheme, stored_whole, profile));
    }
    // a cache's layout is its owner's choice; `position` is what it is made with
    const auto sizes = option_of(request, grid, Scheme::slices, whole, profile).sizes;
    const Scheme taken = cached ? Scheme::position : resolve_scheme(Scheme::automatic, sizes, profile);
    if (grid.slices == 1) {
      options.resize(first);
      options.push_back(option_of(request, grid, taken, whole, profile));
    }
    for (size_t i = first; i < options.size(); ++i) options[i].automatic = options[i].scheme == taken;
  }
  return options;
}

// The exact option with the smallest price; the earlier one wins a tie. -1 if there is none.
inline int64_t pick(const std::vector<Option>& options) {
  int64_t best = -1;
  for (size_t i = 0; i < options.size(); ++i)
    if (options[i].exact && (best < 0 || options[i].price.total() < options[best].price.total()))
      best = int64_t(i);
  return best;
}

// A call to choose a grid by when none is named: the causal forward pass of one sequence of 4096 tokens in
// half precision, of a layer whose embed dim is num_heads * head_dim.
inline PlanRequest typical_call(int64_t ranks, const Heads& heads) {
  return {ranks, heads, heads.num_heads * heads.head_dim, 1, 4096, 4096, 2, false, true, false, false};
}

// The valid grids of `ranks` ranks, the smallest price of a typical call with scheme="auto" first; more head
// groups first where it is equal.
inline std::vector<Grid> ranked_grids(int64_t ranks, const Heads& heads, const Profile& profile) {
  std::vector<std::pair<int64_t, Grid>> priced;
  for (const Option& option : plan_options(typical_call(ranks, heads), profile))
    if (option.automatic) priced.emplace_back(option.price.total(), option.grid);
  std::stable_sort(priced.begin(), priced.end(), [](auto& a, auto& b) { return a.first < b.first; });
  std::vector<Grid> grids;
  for (const auto& [total, grid] : priced) grids.push_back(grid);
  return grids;
}

}  // namespace two_level_mha
