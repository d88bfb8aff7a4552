// Which grid and scheme to take for a call: every valid grid with every scheme, priced (price.h). Sizes are a
// user's, so that numbers are Checked: what does not fit throws std::overflow_error. No torch.
#pragma once

#include <map>

#include "../base/checked.h"
#include "price.h"

namespace two_level_mha {

// Whether scheme="auto" stores the query side by whole heads: where heads share keys and values, it then
// leaves the queries where they are projected.
inline bool stores_whole_heads(const Heads& heads, const Grid& grid) {
  return heads.num_kv_heads < heads.num_heads &&
         whole_heads_fit(heads.num_heads / grid.head_groups, heads.num_kv_heads / grid.head_groups,
                         grid.slices);
}

// Bytes that one rank holds.
struct Memory {
  Checked weights;      // of the layer
  Checked activations;  // that a forward pass keeps for the backward pass
  Checked cache;        // keys and values of all S positions
};

// Elements that the widest rank has of the weights of multi-head latent attention.
inline int64_t latent_weights(const CallSizes<Checked>& s) {
  const LatentSizes& latent = s.latent;
  const int64_t out = s.ydim() * s.H * (s.concat ? s.n * latent.value : slice_width(latent.value, s.m));
  const int64_t norms = latent.rank + latent.query_rank;
  const int64_t biases = s.out_bias ? latent.whole() + s.ydim() : 0;
  return s.H * latent.head_weights(s.m, s.D) + out + s.ydim() * latent.whole() + norms + biases;
}

inline Memory memory_of(Scheme scheme, const CallSizes<Checked>& s) {
  const SchemeRow row = concrete_row(scheme, s);
  const Local<Checked> local = local_sizes(row, s);
  const int64_t q_width = s.query_row(s.q_heads()), kv_width = s.K * s.width(), h = s.n * s.H;
  const int64_t projections = s.D * q_width + (s.kdim() + s.vdim()) * kv_width;
  const int64_t out = s.ydim() * (s.concat ? h * s.d : s.query_row(s.H));
  const int64_t biases = s.bias ? q_width + 2 * kv_width + s.ydim() : 0;
  const Checked weights = s.latent.rank > 0 ? latent_weights(s) : projections + out + biases;

  const Checked queries = local.batch * local.heads * local.rows;
  const Checked keys = s.position > 0 ? 0 : local.batch * local.kv_heads * local.keys;  // else the cache's
  const bool parts = s.split() && (row.x == Move::replicate ||
                                   takes_parts(row, s));  // of X alone: the whole is gathered again
  Checked kept = (parts ? traffic::split_inputs(s) : traffic::input_elements(row, s)) +
                 (queries + keys) * (local.qk_width + local.v_width);
  if (s.concat)
    kept = kept + s.B * s.L * h * s.d;  // the concatenation
  else if (row.out != Move::keep && s.m > 1)
    kept = kept + s.B * s.L * s.query_row(s.H);  // O as W_O takes it
  if (row.w == Move::replicate) kept = kept + s.m * (projections + (s.concat ? 0 : out));
  const bool by_batch = row.cached == Cached::may;  // of the two layouts of a cache; position is the default
  const Checked batch = by_batch ? ceil_div(s.B, s.m) : s.B;
  if (s.latent.rank > 0) kept = kept + s.B * s.L * (s.ydim() + s.latent.rope);  // X and the rotary key
  const Checked positions = by_batch ? s.S : s.cycle.share(s.S, s.latent.rank > 0 ? s.n * s.m : s.m);
  const bool latents = s.latent.rank > 0 && !by_batch;
  const Checked cache = batch * positions * (latents ? s.latent.rank + s.latent.rope : 2 * s.K * s.d);
  const Checked logsumexp = queries * std::max<int64_t>(4, s.element_size);
  return {weights * s.element_size, kept * s.element_size + logsumexp, cache * s.element_size};
}

// A layer and a call of it, to be put on some number of ranks. Of
// the layer, how the query side is stored is the scheme's choice.
struct PlanRequest {
  int64_t ranks;
  LayerSizes layer;
  CallShape<Checked> call;
  bool cached = false;  // the L queries are the last of S positions, the others' keys are kept
  std::map<std::pair<int64_t, int64_t>, Cycle>
      cycles;  // of a cache by position, where shares are not equal, by (n, m)
};

// One line of a plan.
struct Option {
  Grid grid;
  Scheme scheme;
  CallSizes<Checked> sizes;
  bool exact;
  bool automatic;  // what scheme="auto" takes on this grid
  Work<Checked> work;
  Traffic<Checked> forward, backward;
  Memory memory;
  Price<Checked> price;
};

inline Option option_of(const PlanRequest& request, const Grid& grid, Scheme scheme, bool whole_heads,
                        const Rates& rates) {
  LayerSizes layer = request.layer;
  layer.whole_heads = whole_heads;
  if (layer.latent.rank > 0) layer.heads.head_dim = layer.latent.head_dim(grid.slices);
  layer.node = rates.node;
  CallSizes<Checked> s = call_sizes(layer, grid, request.call);
  const auto cycle = request.cycles.find({grid.head_groups, grid.slices});
  if (cycle != request.cycles.end()) s.cycle = cycle->second;
  if (layer.latent.rank > 0) s.inputs = 2;  // what queries, and what keys and values are projected from
  const Price<Checked> priced = price(scheme, s, rates);
  s.overlap = priced.chunks;
  CallSizes<Checked> sent = s;
  sent.sealed = true;  // in the traffic, and in no price
  return {grid,
          scheme,
          s,
          scheme_row(scheme).exact,
          false,
          forward_work(scheme, s),
          forward_traffic(scheme, sent),
          backward_traffic(scheme, s),
          memory_of(scheme, s),
          priced};
}

// Throws for a layer whose constants alone, which price.h and traffic.h multiply as int64_t, leave no room:
// such products are some times the bytes of its weights on all ranks.
inline void check_constants(const PlanRequest& request) {
  constexpr int64_t kRoom = 256;
  const auto& [heads, kv_heads, head_dim] = request.layer.heads;
  const Checked out = std::max(request.layer.D, request.layer.out_dim);
  const auto& [R, N, T, V, Q] = request.layer.latent;
  const Checked latents = (Checked(R) + N + T + V + Q) * (out + heads * (Checked(N) + T + V));
  const Checked weights = (Checked(heads) + kv_heads) * head_dim * (out + 1) + latents;
  static_cast<void>(weights * request.call.element_size * request.ranks * kRoom);
}

// The grids that a layer can take the ranks as: latent attention takes those with the most head groups.
inline std::vector<Grid> grids_of(int64_t ranks, const LayerSizes& layer) {
  const std::vector<Grid> grids = Grid::valid_grids(ranks, layer.heads);
  return layer.latent.rank > 0 && !grids.empty() ? std::vector<Grid>{grids.front()} : grids;
}

// Every valid grid, most head groups first, with every scheme that can run
// the call on it: with keys in a cache its two layouts, else all the others.
// On a grid of one slice they are all the same, and one stands for them, but for the layouts of a cache of latents.
inline std::vector<Option> plan_options(const PlanRequest& request, const Rates& rates) {
  std::vector<Option> options;
  const Heads& heads = request.layer.heads;
  const Cached other = request.cached ? Cached::never : Cached::always;  // no scheme for this call
  const bool latent = request.layer.latent.rank > 0;
  for (const Grid& grid : grids_of(request.ranks, request.layer)) {
    check_constants(request);
    const bool whole = stores_whole_heads(heads, grid);
    const bool heads_fit = whole_heads_fit(heads.num_heads / grid.head_groups,
                                           heads.num_kv_heads / grid.head_groups, grid.slices);
    const size_t first = options.size();
    for (const SchemeRow& row : kSchemes) {
      if (row.cached == other || (row.storage == Storage::whole_heads && !heads_fit)) continue;
      if (!slices_fit(row, heads.head_dim, grid.slices) || (latent && !row.exact)) continue;
      const bool stored_whole = row.storage == Storage::whole_heads || (request.cached && whole);
      options.push_back(option_of(request, grid, row.scheme, stored_whole, rates));
    }
    // a cache's layout is its owner's choice; `position` is what it is made with
    auto sizes = option_of(request, grid, Scheme::slices, whole, rates).sizes;
    sizes.overlap = request.layer.overlap;  // each scheme has its own number of chunks
    const Scheme taken = request.cached ? Scheme::position : resolve_scheme(Scheme::automatic, sizes, rates);
    if (grid.slices == 1 && !(latent && request.cached)) {
      options.resize(first);
      options.push_back(option_of(request, grid, taken, whole, rates));
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
  PlanRequest request{ranks, {heads}, {1, 4096, 4096}};
  request.layer.D = int64_t(Checked(heads.num_heads) * heads.head_dim);
  request.call.element_size = 2;
  request.call.causal = true;
  return request;
}

// The valid grids of `ranks` ranks, the smallest price of a typical call with scheme="auto" first; more head
// groups first where it is equal.
inline std::vector<Grid> ranked_grids(int64_t ranks, const Heads& heads, const Rates& rates) {
  std::vector<std::pair<Checked, Grid>> priced;
  for (const Option& option : plan_options(typical_call(ranks, heads), rates))
    if (option.automatic) priced.emplace_back(option.price.total(), option.grid);
  std::stable_sort(priced.begin(), priced.end(), [](auto& a, auto& b) { return a.first < b.first; });
  std::vector<Grid> grids;
  for (const auto& [total, grid] : priced) grids.push_back(grid);
  return grids;
}

}  // namespace two_level_mha
