#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

namespace two_level_mha {

using at::Tensor;

// The distinct tensors among query, key and value, and which of them is which.
struct Inputs {
  std::vector<Tensor> distinct;
  std::array<size_t, 3> at;

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value)
      : at{index(query), index(key), index(value)} {}

  const Tensor& query() const { return distinct[at[0]]; }
  const Tensor& key() const { return distinct[at[1]]; }
  const Tensor& value() const { return distinct[at[2]]; }

 private:
  size_t index(const Tensor& x) {
    size_t i = 0;
    while (i < distinct.size() && !distinct[i].is_same(x)) ++i;
    if (i == distinct.size()) distinct.push_back(x);
    return i;
  }
};

}  // namespace two_level_mha
