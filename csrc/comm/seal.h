// What the ranks of a grid must have alike in a call, as a hash that rides in an exchange of the call: digits, in the
// exchange's own dtype, at the end of its buffer. From their sums every rank sees whether all ranks had the same.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

namespace two_level_mha {

using at::Tensor;

// A hash of numbers and of tensors' contents, in order.
class Hash {
 public:
  explicit Hash(uint64_t start) : state_(start) {}

  template <class Number>
  std::enable_if_t<std::is_integral_v<Number> || std::is_enum_v<Number>, void> add(Number x) {
    mix(uint64_t(x));
  }
  void add(double x);
  void add(const std::string& text);
  // Shape, dtype, requires_grad and every bit of a CPU tensor; dims of stride 0 are read once.
  void add(const Tensor& x);
  template <class T>
  void add(const std::optional<T>& x) {
    add(x.has_value());
    if (x) add(*x);
  }

  int64_t value() const { return int64_t(state_ & 0x7fffffffffffffff); }

 private:
  void mix(uint64_t x) {
    state_ = (state_ ^ x) * 0x9e3779b97f4a7c15;
    state_ ^= state_ >> 32;
  }

  uint64_t state_;
};

// A rank's digits in the dtype of x: plan/traffic.h has the code.
Tensor seal_digits(int64_t seal, const Tensor& x, int64_t ranks);

// Raises torch.distributed's DistError unless all ranks had the same digits: a collective verdict, since all have
// these sums.
void check_seal(const Tensor& sums, int64_t ranks);

// x as one dim with the digits behind it.
Tensor with_seal(const Tensor& x, const Tensor& digits);

}  // namespace two_level_mha
