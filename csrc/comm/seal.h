// What the ranks of a grid must have alike in a call, as a hash that rides in an exchange of the call: digits, in the
// exchange's own dtype, at the end of its buffer. From their sums every rank sees whether all ranks had the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../plan/traffic.h"
#include "group.h"

namespace two_level_mha {

using at::Tensor;

// What is hashed: numbers, a name, and tensors of one device with their contents, in order.
class Facts {
 public:
  template <class Number>
  std::enable_if_t<std::is_integral_v<Number> || std::is_enum_v<Number>, void> add(Number x) {
    numbers_.emplace_back(int64_t(x));
  }
  void add(const c10::SymInt& x) { numbers_.push_back(x); }
  void add(double x);
  void add(const std::string& text) { text_ += text; }
  // Shape, dtype, requires_grad and every bit; dims of stride 0 are read once.
  void add(const Tensor& x);
  template <class T>
  void add(const std::optional<T>& x) {
    add(x.has_value());
    if (x) add(*x);
  }

  // The hash, an int64 where the tensors are; before: one that it goes on from.
  Tensor hash(const std::optional<Tensor>& before = std::nullopt) const;

 private:
  std::vector<c10::SymInt> numbers_;
  std::vector<Tensor> tensors_;
  std::string text_;
};

// A call's hash, and the ranks that compare it.
struct Seal {
  Tensor hash;
  Group grid;
};

// This rank's digits in the dtype of x: plan/traffic.h has the code.
Tensor digits_of(const Seal& seal, const Tensor& x);

// x as one dim with the digits behind it.
Tensor with_digits(const Tensor& x, const Tensor& digits);

// y, if the sums of all ranks' digits say that they had the same. Else every rank raises torch.distributed's
// DistError, which names those that differ; in a compiled call what the handler throws. Where the handler gives a
// verdict nothing is raised, and nobody waits.
Tensor opened(const Tensor& y, const Tensor& sums, const Seal& seal);

// What `opened` asks for. The group is the grid's.
struct SealHandlers {
  std::function<void(const std::string& text)>
      differ;  // of a compiled call, which has no Python around it: throws
  // Nothing, or two int64 that the host can read: the first becomes 1 where ranks differ, the second this rank's hash.
  std::function<std::optional<Tensor>(const std::string& group, const std::string& layer, at::Device)> expect;
  std::function<void(const std::string& group, at::Device)> sent;  // after it
};

void set_seal_handlers(SealHandlers handlers);

// For implementations: the code of digits of a dtype, and the hash of all that is no tensor. Raise ValueError for what
// has none.
SealCode code_of(at::ScalarType dtype, int64_t ranks);
uint64_t hash_of(at::IntArrayRef numbers, const std::string& text);
// x, each dim of stride 0 cut to one element, contiguous: what of it is hashed.
Tensor once(const Tensor& x);
void check_verdict(const Tensor& sums, const Tensor& hash, const Tensor& verdict, int64_t ranks);

}  // namespace two_level_mha
