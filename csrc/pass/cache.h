// The keys and values of one layer that a rank (i, j) keeps from call to call: the KV heads of head group i,
// d whole, and of the tokens or sequences what is slice j's.
//
//   layout      a rank keeps
//   position    token p where p % m == j, or whose turn is j's, of all sequences
//   batch       sequences j * ceil(B / m) ..., all their tokens
//
// All counts of tokens and sequences are those of the whole call.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include "../plan/turn.h"
#include "numbers.h"

namespace two_level_mha {

// A cache layer but for its memory. Operators take it as
// one list, in the order of kCacheFields, and give it back.
struct CacheNumbers {
  c10::SymInt slices = 1;   // m
  c10::SymInt slice;        // j
  c10::SymInt by_position;  // the layout: position, else batch
  c10::SymInt window;       // tokens that a row sees, itself among them; 0: all
  c10::SymInt max_length;   // of all tokens, allocated at once; 0: memory grows by at most doubling
  c10::SymInt recording;    // keeps tokens that a window has passed too, so that they can come back
  c10::SymInt cycle;        // of positions, which are dealt unequally: plan/turn.h; 0: m of them
  c10::SymInt first, run;   // this rank's part of a cycle
  c10::SymInt batch;        // B
  c10::SymInt length;       // tokens seen
  c10::SymInt oldest;       // position of the first token in memory
  c10::SymInt base;         // token p, if it is this rank's, lies at base + its number among this rank's
  c10::SymInt attached;     // memory is part of a graph, which may have saved it: it is not written to
};

inline constexpr Field<CacheNumbers, c10::SymInt> kCacheFields[] = {
    {"slices", &CacheNumbers::slices},
    {"slice", &CacheNumbers::slice},
    {"by_position", &CacheNumbers::by_position},
    {"window", &CacheNumbers::window},
    {"max_length", &CacheNumbers::max_length},
    {"recording", &CacheNumbers::recording},
    {"cycle", &CacheNumbers::cycle},
    {"first", &CacheNumbers::first},
    {"run", &CacheNumbers::run},
    {"batch", &CacheNumbers::batch},
    {"length", &CacheNumbers::length},
    {"oldest", &CacheNumbers::oldest},
    {"base", &CacheNumbers::base},
    {"attached", &CacheNumbers::attached},
};

struct CacheLayer {
  CacheNumbers numbers;
  std::vector<at::Tensor> memory;  // none, or keys and values: (B or its part, K, capacity, d)

  // Position of the oldest token that the next call attends to.
  c10::SymInt first_key() const;

  // Takes this rank's part of new keys and values (B or its part, K, its tokens, d) of `new_tokens` tokens;
  // gives its part of all that the call attends to, as views of the memory. With gradients the memory is made
  // anew, so that autograd sees through the cache as through a concatenation; so it is where memory of
  // inference mode is read-only. for_gradients: whether attention's other inputs require gradients: its graph
  // saves what is returned, even of frozen keys and values, and no later call may write there.
  std::pair<at::Tensor, at::Tensor> append(const at::Tensor& k, const at::Tensor& v,
                                           const c10::SymInt& new_tokens, bool for_gradients);

  // Sequence b becomes what sequence index[b] was; index (new batch,), int64, the same on every rank. By
  // batch a collective of the slice group, unless every sequence stays on its rank. Raises ValueError for
  // sequences that carry gradients and would have to move.
  void select(const at::Tensor& index, const std::string& slice_group);

  // Forgets the last tokens; those that only `rewind` could have wanted; all. A window may have dropped what
  // rewind should bring back: the caller keeps to what `oldest` says.
  void rewind(const c10::SymInt& tokens) { numbers.length = numbers.length - tokens; }
  void trim() { numbers.oldest = first_key(); }
  void reset() { numbers.length = numbers.oldest = numbers.base = 0; }

 private:
  void check() const;  // raises ValueError for what is no layer of a cache
  Turn turn() const;   // of tokens; each is this rank's where they are not dealt
  // How many of the tokens at positions first, ..., end - 1 are this rank's.
  c10::SymInt own(const c10::SymInt& first, const c10::SymInt& end) const {
    return turn().between(first, end);
  }
  c10::SymInt slot(const c10::SymInt& position) const { return numbers.base + own(0, position); }
  bool fits(const at::Tensor& k) const;
  bool writable() const;
  std::vector<at::Tensor> between(const c10::SymInt& first, const c10::SymInt& end) const;
  void write(const c10::SymInt& slot, const std::vector<at::Tensor>& parts);
  void reserve(const c10::SymInt& first, const c10::SymInt& kept, const c10::SymInt& more,
               const std::vector<at::Tensor>& like);
  c10::SymInt roomy(const c10::SymInt& capacity) const;
  void allocate(const c10::SymInt& capacity, const std::vector<at::Tensor>& like);
  std::vector<at::Tensor> moved(const std::vector<int64_t>& index, const std::string& slice_group) const;
};

}  // namespace two_level_mha
