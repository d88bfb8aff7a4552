// An integer for tables of sizes that a user names: it throws std::overflow_error where int64_t would wrap
// around in silence. Takes part in expressions as c10::SymInt does. No torch.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>

namespace two_level_mha {

class Checked {
 public:
  Checked(int64_t value = 0) : value_(value) {}  // implicit: constants of a layer stay int64_t
  explicit operator int64_t() const { return value_; }
  explicit operator double() const { return double(value_); }
  std::optional<int64_t> maybe_as_int() const { return value_; }

  friend bool operator<(Checked a, Checked b) { return a.value_ < b.value_; }
  friend bool operator>(Checked a, Checked b) { return a.value_ > b.value_; }
  friend bool operator==(Checked a, Checked b) { return a.value_ == b.value_; }
  friend bool operator!=(Checked a, Checked b) { return a.value_ != b.value_; }
  friend Checked operator+(Checked a, Checked b) {
    int64_t sum;
    if (__builtin_add_overflow(a.value_, b.value_, &sum)) overflow();
    return sum;
  }
  friend Checked operator-(Checked a, Checked b) {
    int64_t difference;
    if (__builtin_sub_overflow(a.value_, b.value_, &difference)) overflow();
    return difference;
  }
  friend Checked operator*(Checked a, Checked b) {
    int64_t product;
    if (__builtin_mul_overflow(a.value_, b.value_, &product)) overflow();
    return product;
  }
  friend Checked operator/(Checked a, Checked b) { return a.value_ / b.value_; }
  friend Checked operator%(Checked a, Checked b) { return a.value_ % b.value_; }

 private:
  [[noreturn]] static void overflow() {
    throw std::overflow_error("a number of a plan does not fit into 63 bits");
  }
  int64_t value_;
};

}  // namespace two_level_mha
