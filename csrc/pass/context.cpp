#include "context.h"

#include <c10/core/ScalarType.h>

#include <array>
#include <charconv>
#include <iterator>
#include <sstream>

#include "../base/sizes.h"

namespace two_level_mha {

namespace {

LayerSizes layer_sizes(const Constants& layer, std::optional<at::ScalarType> reduce_dtype) {
  LayerSizes sizes{{layer.num_heads, layer.num_kv_heads, layer.head_dim}, layer.embed_dim};
  sizes.key_dim = layer.key_dim;
  sizes.value_dim = layer.value_dim;
  sizes.out_dim = layer.out_dim;
  sizes.bias = layer.bias != 0;
  sizes.out_bias = layer.out_bias != 0;
  sizes.bias_kv = layer.bias_kv != 0;
  sizes.concat = layer.concat != 0;
  sizes.whole_heads = layer.whole_heads != 0;
  sizes.gated = layer.gated != 0;
  sizes.reduce_size = reduce_dtype ? int64_t(c10::elementSize(*reduce_dtype)) : 0;
  sizes.node = layer.node;
  sizes.activations = Activations(layer.activations);
  sizes.overlap = layer.overlap;
  return sizes;
}

Scheme checked_scheme(int64_t number, const CallSizes<c10::SymInt>& sizes) {
  const Scheme scheme = Scheme(number);
  if (scheme == Scheme::automatic) return scheme;
  for (const SchemeRow& row : kSchemes) {
    if (row.scheme != scheme) continue;
    TORCH_CHECK_VALUE(
        row.storage == Storage::either || (row.storage == Storage::whole_heads) == sizes.whole_heads,
        "scheme '", row.name, "' needs the query side stored by ",
        row.storage == Storage::whole_heads ? "whole heads" : "slices of every head");
    TORCH_CHECK_VALUE(slices_fit(row, sizes.d, sizes.m), "scheme '", row.name,
                      "' needs equal slices: slices=", sizes.m, " must divide head_dim=", sizes.d);
    return scheme;
  }
  TORCH_CHECK_VALUE(false, "scheme must be the number of one of ", scheme_names(), ", got ", number);
}

std::vector<int64_t> checked_shares(const std::string& text, int64_t m) {
  std::istringstream words(text);
  const std::vector<int64_t> shares{std::istream_iterator<int64_t>(words), {}};
  TORCH_CHECK_VALUE(words.eof() && valid_shares(shares, m), "shares must be ", m,
                    " integers, none negative, with a sum from 1 to ", kMostShares, ", got '", text, "'");
  return shares;
}

}  // namespace

void check_place(const Grid& grid, int64_t i, int64_t j) {
  const auto [n, m] = grid;
  TORCH_CHECK_VALUE(n >= 1 && m >= 1 && n <= kMaxRanks / m && 0 <= i && i < n && 0 <= j && j < m,
                    "grid must be (n, m, i, j) with 0 <= i < n, 0 <= j < m and n * m <= ", kMaxRanks,
                    ", got (", n, ", ", m, ", ", i, ", ", j, ")");
}

Context context_of(const std::string& text, c10::SymIntArrayRef sizes) {
  Constants constants;
  const char *at = text.data(), *end = at + text.size();
  for (const auto& field : kConstants) {
    const auto [next, error] = std::from_chars(at, end, constants.*field.member);
    TORCH_CHECK_VALUE(error == std::errc() && next != end && (*next == ' ' || *next == '\n'),
                      "constants must begin with ", std::size(kConstants),
                      " integers, as csrc/pass/context.h has them; there is no ", field.name, " in '", text,
                      "'");
    at = next + 1;
  }
  std::vector<std::string> names(1);
  for (; at != end; ++at) {
    if (*at == '\n')
      names.emplace_back();
    else
      names.back().push_back(*at);
  }
  const bool sealed = sizes.size() == std::size(kSizes) + 1 && constant(sizes.back()) != 0;
  Sizes call = parse("sizes", kSizes, sizes.slice(0, sizes.size() - size_t(sealed)));
  if (sealed) call.number = constant(sizes.back());
  return context_of(constants, names, call);
}

Context context_of(const Constants& constants, const std::vector<std::string>& names, const Sizes& sizes) {
  const Constants& c = constants;
  const Grid grid{c.head_groups, c.slices};
  const Heads heads{c.num_heads, c.num_kv_heads, c.head_dim};
  check_place(grid, c.head_group, c.slice);
  TORCH_CHECK_VALUE(grid.valid(heads), grid.problem(heads));
  TORCH_CHECK_VALUE(3 <= names.size() && names.size() <= 5,
                    "groups must name those of the slice axis, the head axis and the grid, got ",
                    names.size(), " names");
  TORCH_CHECK_VALUE(!c.whole_heads || whole_heads_fit(c.num_heads / grid.head_groups,
                                                      c.num_kv_heads / grid.head_groups, grid.slices),
                    "whole_heads needs heads of a group that ", grid.slices, " slices divide, got ",
                    c.num_heads / grid.head_groups, " and ", c.num_kv_heads / grid.head_groups, " KV heads");
  for (const auto& field : kSizes) {
    const auto size = (sizes.*field.member).maybe_as_int();
    TORCH_CHECK_VALUE(!size || *size >= 0, field.name, " must not be negative, got ", *size);
  }
  TORCH_CHECK_VALUE(c.reduce_dtype < int64_t(at::ScalarType::NumOptions),
                    "reduce_dtype must be the number of a dtype, or -1, got ", c.reduce_dtype);
  TORCH_CHECK_VALUE(0 <= c.activations && c.activations <= int64_t(Activations::batch),
                    "activations must be 0, 1 or 2, got ", c.activations);
  TORCH_CHECK_VALUE(0 <= c.overlap && c.overlap <= kMostChunks, "overlap must be from 0 to ", kMostChunks,
                    ", got ", c.overlap);
  Context context;
  context.grid = grid;
  context.head_group = c.head_group;
  context.slice = c.slice;
  if (names.size() == 5) context.shares = checked_shares(names[4], c.slices);
  context.turn = turn_of(context.shares, c.slices, c.slice);
  const std::string layer = names.size() > 3 ? names[3] : "";
  context.groups = {{names[0], c.slices, c.slice, layer, "slice axis"},
                    {names[1], c.head_groups, c.head_group, layer, "head axis"},
                    {names[2], context.grid.size(), context.grid.rank(c.head_group, c.slice), layer, "grid"},
                    c.node};
  if (c.reduce_dtype >= 0) context.reduce_dtype = at::ScalarType(c.reduce_dtype);
  if (context.grid.size() > 1) context.number = sizes.number;
  context.first_key = sizes.first_key;
  context.zero_key = c.zero_key != 0;
  context.batch_first = c.batch_first != 0;

  CallShape<c10::SymInt> shape{sizes.batch, sizes.length, sizes.position + sizes.keys};
  shape.position = sizes.position;
  shape.extra_keys = int64_t(c.bias_kv != 0) + int64_t(context.zero_key);
  shape.S = shape.S + shape.extra_keys;
  shape.element_size = c.element_size;
  shape.causal = c.causal != 0;
  shape.in_halves = c.in_halves != 0;
  shape.cycle = cycle_of(context.shares);
  context.sizes = call_sizes(layer_sizes(c, context.reduce_dtype), context.grid, shape);

  const Rates rates{c.flops,
                    c.memory,
                    c.link,
                    c.network,
                    c.latency,
                    c.node,
                    c.equal,
                    c.flops_single,
                    c.attention_128,
                    c.attention_256,
                    c.attention_wide,
                    c.attention_single_128,
                    c.attention_single_256,
                    c.attention_single_wide,
                    c.hidden};
  TORCH_CHECK_VALUE(rates.valid(), Rates::kInvalid);
  const Scheme scheme = resolve_scheme(checked_scheme(c.scheme, context.sizes), context.sizes, rates);
  context.row = concrete_row(scheme, context.sizes);
  if (c.overlap == 0)
    context.sizes.overlap =
        may_overlap(scheme, context.sizes, rates) ? price(scheme, context.sizes, rates).chunks : 1;
  context.takes_parts = takes_parts(context.row, context.sizes);
  return context;
}

Context Context::of_chunk(const Chunking& chunks, int64_t c) const {
  if (chunks.count == 1) return *this;
  Context chunk = *this;
  const auto before = chunk_begin(chunks, sizes.B, c);
  chunk.sizes.B = (chunk_begin(chunks, sizes.B, c + 1) - before) * chunks.parts;
  chunk.first_sequence = (sharded_dim() == 0 ? runs(sizes.B)[0].first : c10::SymInt(0)) + before;
  if (sharded_dim() == 0) chunk.first_sequence = chunk.first_sequence - chunk.runs(chunk.sizes.B)[0].first;
  if (c + 1 < chunks.count) chunk.seal.reset();  // it goes with the last
  return chunk;
}

int64_t Context::sharded_dim() const {
  if (sizes.m == 1) return -1;
  return row.q == Move::batch ? 0 : row.q == Move::rows ? 2 : -1;
}

std::vector<std::pair<c10::SymInt, c10::SymInt>> Context::runs(const c10::SymInt& size) const {
  const int64_t m = sizes.m;
  if (sharded_dim() < 0) return {{c10::SymInt(0), size}};
  auto chunk = ceil_div(size, zigzag() ? 2 * m : m);
  if (!zigzag()) return {{chunk * slice, chunk}};
  return {{chunk * slice, chunk}, {chunk * (2 * m - 1 - slice), chunk}};
}

void check_layout(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Context& context) {
  const CallSizes<c10::SymInt>& s = context.sizes;
  const Local<c10::SymInt> local = local_sizes(context.row, s);
  const auto keys =
      context.row.k == Move::cyclic ? context.turn.between(context.first_key, s.S) : s.S - context.first_key;
  auto batch = local.batch, rows = local.rows;
  auto check = [&](const char* name, const at::Tensor& x, const std::array<c10::SymInt, 4>& sizes) {
    bool fits = x.dim() == 4 && fixed_size(x, 1) == sizes[1] && fixed_size(x, 3) == sizes[3];
    for (int64_t dim : {0, 2}) {
      // no guard on what is symbolic: it came from the same sizes
      const auto got = fits ? x.sym_size(dim).maybe_as_int() : std::nullopt, want = sizes[dim].maybe_as_int();
      fits = fits && (!got || !want || *got == *want);
    }
    TORCH_CHECK_VALUE(fits, name, " must have shape (", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ",
                      sizes[3], ") in this call, got ", x.sym_sizes());
  };
  check("q", q, {batch, local.heads, rows, local.qk_width});
  check("k", k, {batch, local.kv_heads, keys, local.qk_width});
  const int64_t v_width = context.row.v == Move::keep ? context.columns().count : local.v_width;
  check("v", v, {batch, local.kv_heads, keys, v_width});
}

}  // namespace two_level_mha
