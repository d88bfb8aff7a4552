// The table of what one rank sends in a call: for every scheme and combine, forward and backward, in bytes
// and in collectives. Counted as a ring, or a pairwise exchange, puts them on the wire, padding included:
//
//   all_gather of N (the local piece)     (g - 1) * N
//   all_to_all, reduce_scatter of N       (g - 1) * N / g
//   all_reduce of N                       2 * (g - 1) * N / g
//
// A grid of one rank sends nothing. No torch.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "schemes.h"

namespace two_level_mha {

enum class Axis : int64_t { slice, head, grid };

// One row of the table.
template <class I>
struct Sent {
  const char* what;
  Axis axis;  // the group it runs in
  I bytes;    // without `biases`
  int64_t collectives;
  int64_t biases = 0;   // bytes of biases that travel along
  bool enters = false;  // before attention
};

template <class I>
using Traffic = std::vector<Sent<I>>;

// Below this many elements one flat all-reduce is cheaper than three smaller collectives.
inline constexpr int64_t kFlatSumElements = 1 << 16;

// How what the ranks compare (comm/seal.h) is written as numbers that a sum over the ranks keeps exactly: digits d of
// so many bits, each as d and d * d, or, where rounding leaves no room for that, as a bit and its complement.
struct SealCode {
  static constexpr int64_t kBits = 20;  // at least, in all
  int64_t bits;
  bool complement;

  int64_t digits() const { return (kBits + bits - 1) / bits; }
  int64_t elements() const { return 2 * digits(); }
};

inline SealCode seal_code(int64_t element_size, int64_t ranks) {
  int64_t exact = element_size >= 8 ? 53 : element_size >= 4 ? 24 : 8;  // bits of the largest integer
  for (int64_t reach = 1; reach < ranks; reach *= 2) --exact;
  return exact >= 2 ? SealCode{std::min(exact / 2, SealCode::kBits), false} : SealCode{1, true};
}

// Whether a sum over an (n, m) grid is one all-reduce over all of it, or a reduce-scatter over the slices, an
// all-reduce over the head groups and an all-gather over the slices. Inside a node all of it goes over the same links:
// the stages would send as much, in three collectives.
template <class I>
bool sums_flat(const I& elements, int64_t n, int64_t m, int64_t node) {
  if (n == 1 || m == 1 || n * m <= node) return true;
  auto value = known(elements);
  return value && *value < kFlatSumElements;
}

namespace traffic {

template <class I>
I all_reduce(const I& bytes, int64_t ranks) {
  return bytes * (2 * (ranks - 1)) / ranks;
}

// Elements that a rank sends to each of the others to move `length` rows of `width` elements: of its slices of heads, the
// narrower filled up, or of its whole heads.
template <class I>
I part(Move move, int64_t width, const I& length, const CallSizes<I>& s, bool zigzag) {
  switch (move) {
    case Move::keep:
      return I(0);
    case Move::replicate:
    case Move::one_head:
    case Move::merge:
      return s.B * length * width;
    case Move::batch:
      return ceil_div(s.B, s.m) * length * width;
    case Move::heads:
      return s.B * length * (width / s.m);
    case Move::rows:
      return s.B * shard_rows(length, s.m, zigzag) * width;
    case Move::cyclic:
      return s.B * s.cycle.rows(s.position, length, s.m) * width;
    default:
      throw std::logic_error("a move that depends on the call");
  }
}

// Tokens of (B, length) that a rank holds.
template <class I>
I tokens(Move move, const I& length, const CallSizes<I>& s) {
  if (move == Move::batch) return ceil_div(s.B, s.m) * length;
  return s.B * (move == Move::rows ? shard_rows(length, s.m, s.causal) : length);
}

// Features of the tokens of the distinct inputs that a rank projects.
template <class I>
I input_elements(const SchemeRow& row, const CallSizes<I>& s) {
  I elements = tokens(row.x, s.L, s) * s.D;
  if (s.inputs > 1) elements = elements + tokens(row.x, s.given_keys(), s) * s.kdim();
  if (s.inputs > 2) elements = elements + tokens(row.x, s.given_keys(), s) * s.vdim();
  return elements;
}

template <class I>
int64_t reduce_size(const CallSizes<I>& s) {
  return s.reduce_size > 0 ? s.reduce_size : s.element_size;
}

// A sum of the same elements on every rank, over the grid.
template <class I>
void add_sum(Traffic<I>& rows, const char* what, const I& elements, const CallSizes<I>& s) {
  const int64_t size = reduce_size(s);
  if (s.n * s.m == 1) return;
  if (sums_flat(elements, s.n, s.m, s.node)) {
    rows.push_back({what, Axis::grid, all_reduce<I>(elements * size, s.n * s.m), 1});
  } else {
    const I piece = ceil_div(elements, s.m) * size;
    rows.push_back({what, Axis::slice, piece * (2 * (s.m - 1)), 2});
    rows.push_back({what, Axis::head, all_reduce<I>(piece, s.n), 1});
  }
}

// A sum over the head axis of elements sharded over the slice axis, then gathered there.
template <class I>
void add_sharded_sum(Traffic<I>& rows, const char* what, const I& mine, const CallSizes<I>& s) {
  if (s.n > 1) rows.push_back({what, Axis::head, all_reduce<I>(mine * reduce_size(s), s.n), 1});
  rows.push_back({what, Axis::slice, mine * (s.element_size * (s.m - 1)), 1});
}

// The hierarchical all-gather, head axis first; what is sealed stays as it is from stage to stage.
template <class I>
void add_gather(Traffic<I>& rows, const char* what, const I& local, const CallSizes<I>& s,
                const I& sealed = I(0)) {
  if (s.n > 1) rows.push_back({what, Axis::head, (local + sealed) * (s.element_size * (s.n - 1)), 1});
  if (s.m > 1) rows.push_back({what, Axis::slice, (local * s.n + sealed) * (s.element_size * (s.m - 1)), 1});
}

// Tokens that a rank has where activations are split, chunks filled up.
template <class I>
I split_tokens(const I& length, const CallSizes<I>& s) {
  const int64_t P = s.n * s.m;
  const bool rows = s.activations == Activations::sequence;
  return (rows ? s.B : ceil_div(s.B, P)) * (rows ? shard_rows(length, P, true) : length);
}

// Elements of the inputs, and of Y, that a rank has then.
template <class I>
I split_inputs(const CallSizes<I>& s) {
  I elements = split_tokens(s.L, s) * s.D;
  if (s.inputs > 1) elements = elements + split_tokens(s.given_keys(), s) * s.kdim();
  if (s.inputs > 2) elements = elements + split_tokens(s.given_keys(), s) * s.vdim();
  return elements;
}

template <class I>
I split_output(const CallSizes<I>& s) {
  return split_tokens(s.L, s) * s.ydim();
}

// The same in chunks of the batch, of which the elements are a multiple, with what is sealed in the last.
template <class I>
void add_sums(Traffic<I>& rows, const char* what, const Chunking& chunks, const I& elements, const I& sealed,
              const CallSizes<I>& s) {
  if (chunks.count == 1) return add_sum<I>(rows, what, elements + sealed, s);
  const I each = elements / s.B;
  for (int64_t c = 0; c < chunks.count; ++c) {
    const I batch = (chunk_begin(chunks, s.B, c + 1) - chunk_begin(chunks, s.B, c)) * chunks.parts;
    add_sum<I>(rows, what, c + 1 < chunks.count ? each * batch : each * batch + sealed, s);
  }
}

// An all-gather of split tensors, or the reduce-scatter that is its adjoint: they send alike. parts: over the head axis,
// whose ranks' parts are taken as they are.
template <class I>
void add_split(Traffic<I>& rows, const char* what, const I& elements, int64_t element_size, bool parts,
               const CallSizes<I>& s, const Chunking& chunks = {}) {
  const int64_t ranks = parts ? s.n : s.n * s.m;
  if (ranks > 1)
    rows.push_back(
        {what, parts ? Axis::head : Axis::grid, elements * (element_size * (ranks - 1)), chunks.count});
}

// The tokens of Y, or of the gradient of X: as every rank has them, or as they are sharded.
template <class I>
void add_tokens_sum(Traffic<I>& rows, const char* what, Move move, const Chunking& chunks, const I& elements,
                    const I& sealed, const CallSizes<I>& s) {
  move == Move::replicate ? add_sums<I>(rows, what, chunks, elements, sealed, s)
                          : add_sharded_sum<I>(rows, what, elements + sealed, s);
}

// The exchanges inside a slice group. Each one's adjoint sends as much as it does: an all-to-all is its own,
// a gather's is a reduce-scatter, since the ranks use what they gathered each in its own way.
template <class I>
void add_exchanges(Traffic<I>& rows, const SchemeRow& row, const CallSizes<I>& s) {
  const int64_t E = s.width(), others = s.m - 1, each = s.element_size * others;
  const bool zigzag = zigzag_rows(row, s.causal);
  if (row.w == Move::replicate) {
    const int64_t blocks = E * (s.q_heads() * s.D + s.K * (s.kdim() + s.vdim()));
    const int64_t biases = E * (s.bias ? s.q_heads() + 2 * s.K : 0) + E * (s.bias_kv ? 2 * s.K : 0);
    rows.push_back({"weights", Axis::slice, I(blocks * each), 1, biases * each});
    if (!s.concat) rows.push_back({"output weights", Axis::slice, I(E * s.H * s.ydim() * each), 1});
    if (row.k == Move::replicate)
      rows.push_back({"move in", Axis::slice,
                      s.B * shard_rows(s.given_keys(), s.m, zigzag) * (2 * s.K * s.d * each), 1});
  } else if (row.q != Move::keep || row.k != Move::keep) {
    const I sent = part(row.q, s.query_row(s.q_heads()), s.L, s, zigzag) +
                   part(row.k, s.K * E, s.moved_keys(), s, zigzag) +
                   part(row.v, s.K * E, s.moved_keys(), s, zigzag);
    rows.push_back({"move in", Axis::slice, sent * each, enter_chunks(row, s).count, 0, /*enters=*/true});
  }
  if (row.out == Move::keep) return;
  I bytes = part(row.out, s.query_row(s.H), s.L, s, zigzag) * each;
  if (row.out == Move::merge)  // and the logsumexp, in no less than float32
    bytes = bytes +
            s.B * s.L * ((s.whole_heads ? s.H / s.m : s.H) * std::max<int64_t>(4, s.element_size) * others);
  // two dtypes do not share an exchange that has a gradient
  const bool two = row.out == Move::merge && s.training && s.element_size < 4;
  rows.push_back({"move out", Axis::slice, bytes, (two ? 2 : 1) * leave_chunks(row, s).count});
}

template <class I>
void add_attention_weights(Traffic<I>& rows, const SchemeRow& row, const CallSizes<I>& s) {
  const bool average = s.attention_weights == 1;
  const I all_heads = s.B * s.L * s.S * s.H;
  if (row.q == Move::keep) {  // heads of this rank alone
    if (average) return add_sum<I>(rows, "attention weights", s.B * s.L * s.S, s);
    const bool whole = row.storage == Storage::whole_heads;
    return add_gather<I>(rows, "attention weights", whole ? all_heads / s.m : all_heads, s);
  }
  if (s.m > 1 && (row.q == Move::batch || row.q == Move::rows))
    rows.push_back({"attention weights", Axis::slice,
                    tokens(row.q, s.L, s) * s.S * (s.H * s.element_size * (s.m - 1)), 1});
  if (s.n == 1) return;
  const I bytes = average ? all_reduce<I>(s.B * s.L * s.S * reduce_size(s), s.n)
                          : all_heads * (s.element_size * (s.n - 1));
  rows.push_back({"attention weights", Axis::head, bytes, 1});
}

// A later call with a cache of latents, which all ranks in a row keep by position: queries of all heads, on latents, come
// to every rank, and what the ranks found of them is merged, in the logsumexp's dtype.
template <class I>
Traffic<I> latent_exchanges(const CallSizes<I>& s) {
  const auto& [R, N, T, V, Q] = s.latent;
  const int64_t found = std::max<int64_t>(4, s.element_size);
  const I heads = s.B * s.L * s.H, sent = heads * s.element_size;
  Traffic<I> rows;
  if (s.m > 1) {
    rows.push_back({"queries", Axis::slice, sent * (slice_width(N + T, s.m) * (s.m - 1)), 1});
    rows.push_back({"queries on latents", Axis::slice, all_reduce<I>(sent * R, s.m), 1});
  }
  if (s.n > 1) {
    rows.push_back({"queries of all heads", Axis::head, sent * ((R + T) * (s.n - 1)), 1});
    rows.push_back({"merge", Axis::head, heads * ((R + 1) * found * (s.n - 1)), 1});
  }
  if (s.m > 1) rows.push_back({"merge", Axis::slice, heads * ((R + 1) * found * (s.m - 1)), 1});
  return rows;
}

// One sum over the grid of what every rank has whole.
template <class I>
void add_whole_sum(Traffic<I>& rows, const char* what, const I& elements, const CallSizes<I>& s) {
  rows.push_back({what, Axis::grid, all_reduce<I>(elements * reduce_size(s), s.n * s.m), 1});
}

// Whether a call attends to latents in a cache.
template <class I>
bool on_latents(Scheme scheme, const CallSizes<I>& s) {
  return s.latent.rank > 0 && scheme == Scheme::position;
}

}  // namespace traffic

template <class I>
Traffic<I> forward_traffic(Scheme scheme, const CallSizes<I>& s) {
  Traffic<I> rows;
  if (s.n * s.m == 1) return rows;
  if (traffic::on_latents(scheme, s)) {
    rows = traffic::latent_exchanges(s);
    traffic::add_whole_sum<I>(rows, "combine", s.B * s.L * s.ydim(), s);
    return rows;
  }
  const SchemeRow row = concrete_row(scheme, s);
  const bool parts = takes_parts(row, s), parts_out = parts && !s.concat;
  const Chunking in = enter_chunks(row, s), out = leave_chunks(row, s);
  if (s.split()) {
    traffic::add_split(rows, "X", traffic::split_inputs(s), s.element_size, parts, s, in);
    if (!rows.empty()) rows.back().enters = true;
  }
  if (s.m > 1) traffic::add_exchanges(rows, row, s);
  const int64_t reduce_size = traffic::reduce_size(s);
  const bool summed = !s.concat && row.y == Move::replicate;
  const I sealed(s.sealed ? seal_code(summed ? reduce_size : s.element_size, s.n * s.m).elements() : 0);
  if (s.concat)
    traffic::add_gather<I>(rows, "combine", s.B * s.L * s.query_row(s.H), s, sealed);
  else if (parts_out)
    traffic::add_split(rows, "combine", traffic::split_output(s), reduce_size, true, s);
  else if (s.split() && summed)
    traffic::add_split(rows, "combine", traffic::split_output(s) + sealed, reduce_size, false, s, out);
  else
    traffic::add_tokens_sum<I>(rows, "combine", row.y, out, traffic::tokens(row.y, s.L, s) * s.ydim(), sealed,
                               s);
  if (parts_out && s.sealed)
    rows.push_back({"compared", Axis::grid, traffic::all_reduce<I>(sealed * s.element_size, s.n * s.m), 1});
  if (s.attention_weights) traffic::add_attention_weights(rows, row, s);
  return rows;
}

// Combine and the attention weights have no row: what they return is used alike by every rank, so each keeps
// its own part of the gradient. Nor have weights, whose gradients are complete on their owner, but for the
// exchanges of scheme "weights".
template <class I>
Traffic<I> backward_traffic(Scheme scheme, const CallSizes<I>& s) {
  Traffic<I> rows;
  if (s.n * s.m == 1) return rows;
  if (traffic::on_latents(scheme, s)) {  // an exchange's adjoint sends as much as it does
    rows = traffic::latent_exchanges(s);
    traffic::add_whole_sum<I>(rows, "dX", s.B * s.L * s.D, s);
    traffic::add_whole_sum<I>(rows, "latent gradient", s.B * s.L * s.latent.rank, s);
    traffic::add_whole_sum<I>(rows, "rotary key gradient", s.B * s.L * s.latent.rope, s);
    if (s.concat)
      traffic::add_whole_sum<I>(rows, "output weights gradient", I(s.n * s.H * s.latent.value * s.ydim()), s);
    return rows;
  }
  const SchemeRow row = concrete_row(scheme, s);
  const bool parts = takes_parts(row, s), parts_out = parts && !s.concat;
  const bool again =
      s.split() && (parts || row.x == Move::replicate);  // X is not kept, but for this rank's part
  const Chunking in = enter_chunks(row, s), out = leave_chunks(row, s);
  if (s.split()) traffic::add_split(rows, "dY", traffic::split_output(s), s.element_size, parts_out, s, out);
  if (parts_out && s.out_bias) traffic::add_sum<I>(rows, "output bias gradient", I(s.ydim()), s);
  if (again) traffic::add_split(rows, "X", traffic::split_inputs(s), s.element_size, parts, s);
  if (s.m > 1) traffic::add_exchanges(rows, row, s);
  if (again)
    traffic::add_split(rows, "dX", traffic::split_inputs(s), traffic::reduce_size(s), parts, s, in);
  else
    traffic::add_tokens_sum<I>(rows, "dX", row.x, in, traffic::input_elements(row, s), I(0), s);
  if (s.latent.rank > 0) traffic::add_whole_sum<I>(rows, "rotary key gradient", s.B * s.L * s.latent.rope, s);
  if (s.mask_elements) traffic::add_sum<I>(rows, "mask gradient", I(s.mask_elements), s);
  return rows;
}

}  // namespace two_level_mha
