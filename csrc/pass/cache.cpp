#include "cache.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <set>

#include "../base/arithmetic.h"
#include "../comm/exchange.h"
#include "../plan/grid.h"

namespace two_level_mha {

using at::Tensor;

namespace {

Tensor rows_of(const Tensor& x, const c10::SymInt& first, const c10::SymInt& count) {
  return x.narrow_symint(2, first, count);
}

}  // namespace

void CacheLayer::check() const {
  const auto& n = numbers;
  TORCH_CHECK_VALUE(memory.empty() || memory.size() == 2, "memory must be none, or keys and values, got ",
                    memory.size(), " tensors");
  for (const Tensor& x : memory)
    TORCH_CHECK_VALUE(x.dim() == 4, "memory must be (B, K, capacity, d), got ", x.dim(), "-D");
  const int64_t m = constant(n.slices), j = constant(n.slice);
  TORCH_CHECK_VALUE(1 <= m && m <= kMaxRanks && 0 <= j && j < m,
                    "a cache must be of slice j of m with 0 <= j < m <= ", kMaxRanks, ", got ", j, " of ", m);
  const int64_t cycle = constant(n.cycle), first = constant(n.first), run = constant(n.run);
  TORCH_CHECK_VALUE(0 <= cycle && cycle <= kMostShares && 0 <= first && 0 <= run && run <= cycle - first,
                    "the part of a cycle of at most ", kMostShares, " positions must lie in it, got ", first,
                    " to ", first, " + ", run, " of ", cycle);
  for (const auto* count : {&n.window, &n.max_length, &n.batch, &n.length, &n.oldest}) {
    const auto number = count->maybe_as_int();
    TORCH_CHECK_VALUE(!number || *number >= 0, "counts of a cache must not be negative, got ", *number);
  }
  const auto oldest = n.oldest.maybe_as_int(), length = n.length.maybe_as_int();
  TORCH_CHECK_VALUE(!memory.empty() || !oldest || !length || *oldest == *length,
                    "memory must be keys and values where a cache has tokens, got none for ", *length);
}

c10::SymInt CacheLayer::first_key() const {
  if (numbers.window == 0 || numbers.length < numbers.window) return 0;
  return numbers.length - numbers.window + 1;
}

Turn CacheLayer::turn() const {
  if (constant(numbers.by_position) == 0) return {};
  const int64_t cycle = constant(numbers.cycle);
  if (cycle == 0) return {constant(numbers.slices), constant(numbers.slice), 1};
  return {cycle, constant(numbers.first), constant(numbers.run)};
}

bool CacheLayer::fits(const Tensor& k) const {
  const Tensor& held = memory[0];
  return held.sym_size(0) == k.sym_size(0) && held.scalar_type() == k.scalar_type() &&
         held.device() == k.device();
}

// Not what a graph may have saved nor, once inference mode is left, what was made in it.
bool CacheLayer::writable() const {
  if (memory.empty() || numbers.attached != 0) return false;
  return c10::InferenceMode::is_enabled() || !memory[0].is_inference();
}

// This rank's tokens of those from position `first` on, before `end`.
std::vector<Tensor> CacheLayer::between(const c10::SymInt& first, const c10::SymInt& end) const {
  std::vector<Tensor> parts;
  for (const Tensor& x : memory) parts.push_back(rows_of(x, slot(first), own(first, end)));
  return parts;
}

void CacheLayer::write(const c10::SymInt& slot, const std::vector<Tensor>& parts) {
  at::NoGradGuard guard;
  for (size_t i = 0; i < parts.size(); ++i) rows_of(memory[i], slot, parts[i].sym_size(2)).copy_(parts[i]);
}

// Tokens to allocate for when `capacity` does not do.
c10::SymInt CacheLayer::roomy(const c10::SymInt& capacity) const {
  const Turn own = turn();
  auto room = numbers.max_length != 0 ? own.room(numbers.max_length) : capacity * 2;
  const auto sliding = own.room(numbers.window) * 2;  // moved to the front once in a window
  return numbers.window != 0 && sliding < room ? sliding : room;
}

void CacheLayer::allocate(const c10::SymInt& capacity, const std::vector<Tensor>& like) {
  std::vector<Tensor> made;
  for (const Tensor& x : like)
    made.push_back(x.detach().new_empty_symint({x.sym_size(0), x.sym_size(1), capacity, x.sym_size(3)}));
  memory = made;
  numbers.attached = 0;
}

// Makes room for `more` tokens behind the `kept` ones from position `first` on; may move them.
void CacheLayer::reserve(const c10::SymInt& first, const c10::SymInt& kept, const c10::SymInt& more,
                         const std::vector<Tensor>& like) {
  const auto needed = kept + more;
  const auto capacity = memory.empty() ? c10::SymInt(0) : memory[0].sym_size(2);
  const bool may_write = writable();
  if (may_write && slot(first) + needed <= capacity) return;
  std::vector<Tensor> old;
  if (kept != 0)
    for (const Tensor& x : memory) old.push_back(rows_of(x, slot(first), kept));
  if (!(may_write && needed <= capacity && slot(first) >= kept)) {
    const auto room = roomy(capacity);
    allocate(needed < room ? room : needed, like);
  }
  numbers.base = -own(0, first);
  if (kept != 0) write(0, old);
}

std::pair<Tensor, Tensor> CacheLayer::append(const Tensor& k, const Tensor& v, const c10::SymInt& new_tokens,
                                             bool for_gradients) {
  check();
  TORCH_CHECK_VALUE(k.dim() == 4 && v.dim() == 4, "k and v must be 4-D (B, heads, length, dim), got ",
                    k.dim(), "-D and ", v.dim(), "-D");
  const std::vector<Tensor> added{k, v};
  const auto first = first_key(), before = numbers.oldest, old_length = numbers.length;
  TORCH_CHECK_VALUE(k.sym_size(2) == own(old_length, old_length + new_tokens),
                    "k must hold this rank's part of ", new_tokens, " new tokens, got ", k.sym_size(2),
                    " of them");
  if (!memory.empty() && !fits(k)) {
    TORCH_CHECK_VALUE(old_length == 0, "the cache holds ", memory[0].scalar_type(), " keys on ",
                      memory[0].device(), ", the new ones are ", k.scalar_type(), " on ", k.device(),
                      ": reset() it first");
    memory.clear();
    numbers.attached = 0;
  }
  const auto kept = own(before, old_length), seen = own(first, old_length);
  numbers.length = old_length + new_tokens;
  if (numbers.recording == 0) numbers.oldest = first_key();
  const auto keep = own(numbers.oldest, numbers.length);
  const bool trained = for_gradients || numbers.attached != 0 || k.requires_grad() || v.requires_grad();
  const bool graph = trained && at::GradMode::is_enabled();
  if (!graph && keep >= k.sym_size(2)) {
    reserve(before, kept, k.sym_size(2), added);
    const auto end = slot(before) + kept;
    write(end, added);
    auto visible = [&](const Tensor& x) { return rows_of(x, end - seen, seen + k.sym_size(2)); };
    return {visible(memory[0]), visible(memory[1])};
  }
  // A graph's memory is what it saved; or there are more new tokens than a window keeps.
  std::vector<Tensor> all = added;
  if (kept != 0)
    for (size_t i = 0; i < all.size(); ++i)
      all[i] = at::cat({rows_of(memory[i], slot(before), kept), added[i]}, 2);
  const auto size = all[0].sym_size(2);
  if (graph) {
    memory = all;
    numbers.base = size - keep - own(0, numbers.oldest);
    numbers.attached = 1;
  } else {
    numbers.base = -own(0, numbers.oldest);
    reserve(numbers.oldest, 0, keep, added);
    write(0, {rows_of(all[0], size - keep, keep), rows_of(all[1], size - keep, keep)});
  }
  auto visible = [&](const Tensor& x) { return rows_of(x, kept - seen, size - (kept - seen)); };
  return {visible(all[0]), visible(all[1])};
}

void CacheLayer::select(const Tensor& index, const std::string& slice_group) {
  check();
  if (!memory.empty() && numbers.length != 0) {
    const bool moves = constant(numbers.by_position) == 0 && numbers.slices != 1;
    std::vector<Tensor> parts;
    if (moves) {
      const Tensor numbers_of = index.to(at::kCPU, at::kLong).contiguous();
      const int64_t* data = numbers_of.const_data_ptr<int64_t>();
      parts = moved({data, data + numbers_of.numel()}, slice_group);
    } else {
      for (const Tensor& x : between(numbers.oldest, numbers.length))
        parts.push_back(x.index_select(0, index.to(x.device(), at::kLong)));
    }
    if (numbers.attached != 0) {
      memory = parts;
      numbers.base = -own(0, numbers.oldest);
    } else {
      if (!writable() || parts[0].sym_size(0) != memory[0].sym_size(0))
        allocate(memory[0].sym_size(2), parts);
      write(slot(numbers.oldest), parts);
    }
  }
  numbers.batch = index.sym_numel();
}

// This rank's sequences of the new batch; each crosses once to a rank that wants it.
std::vector<Tensor> CacheLayer::moved(const std::vector<int64_t>& index,
                                      const std::string& slice_group) const {
  const int64_t m = constant(numbers.slices), j = constant(numbers.slice);
  const int64_t old_size = memory[0].size(0);
  for (int64_t b : index)
    TORCH_CHECK_VALUE(0 <= b && b < old_size * m, "index must be of sequences 0 to ", old_size * m - 1,
                      ", got ", b);
  const int64_t new_size = ceil_div<int64_t>(index.size(), m);
  auto share = [&](int64_t rank) {
    const int64_t first = std::min<int64_t>(rank * new_size, index.size());
    const int64_t end = std::min<int64_t>(first + new_size, index.size());
    return std::vector<int64_t>(index.begin() + first, index.begin() + end);
  };
  std::vector<std::vector<int64_t>> wanted;  // by rank, each sequence once, in order
  bool stays = true;
  for (int64_t rank = 0; rank < m; ++rank) {
    const auto mine = share(rank);
    const std::set<int64_t> distinct(mine.begin(), mine.end());
    wanted.emplace_back(distinct.begin(), distinct.end());
    for (int64_t b : wanted.back()) stays = stays && b / old_size == rank;
  }
  const auto parts = between(numbers.oldest, numbers.length);
  Tensor x = at::stack(parts, 1);
  TORCH_CHECK_VALUE(!x.requires_grad(),
                    "sequences that carry gradients cannot move between ranks: select under no_grad");
  std::vector<int64_t> at;
  if (stays) {
    for (int64_t b : share(j)) at.push_back(b - j * old_size);
  } else {
    std::vector<int64_t> rows, sent(m), received(m);
    for (int64_t rank = 0; rank < m; ++rank) {
      for (int64_t b : wanted[rank])
        if (b / old_size == j) rows.push_back(b - j * old_size), ++sent[rank];
      received[rank] =
          std::count_if(wanted[j].begin(), wanted[j].end(), [&](int64_t b) { return b / old_size == rank; });
    }
    x = exchange_rows(x.index_select(0, at::tensor(rows, at::kLong).to(x.device())), sent, received,
                      {slice_group, m, j});
    for (int64_t b : share(j))
      at.push_back(std::lower_bound(wanted[j].begin(), wanted[j].end(), b) - wanted[j].begin());
  }
  auto sizes = x.sizes().vec();
  sizes[0] = new_size;
  Tensor moved = x.new_zeros(sizes);
  const int64_t count = at.size();
  moved.narrow(0, 0, count).copy_(x.index_select(0, at::tensor(at, at::kLong).to(x.device())));
  return moved.unbind(1);
}

}  // namespace two_level_mha
