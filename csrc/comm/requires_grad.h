#pragma once

#include "../base/sizes.h"

#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace two_level_mha {

// Puts those of `xs` that need gradients through `function` in one call, as many in as out; the others stay.
template <class Function>
std::vector<Tensor> where_requires_grad(std::vector<Tensor> xs, const Function& function) {
  std::vector<Tensor> trained;
  for (const Tensor& x : xs)
    if (x.requires_grad()) trained.push_back(x);
  if (trained.empty() || !at::GradMode::is_enabled()) return xs;
  std::vector<Tensor> out = function(at::TensorList(trained));
  size_t next = 0;
  for (Tensor& x : xs)
    if (x.requires_grad()) x = out[next++];
  return xs;
}

}  // namespace two_level_mha
