// Collectives inside one group of ranks, each begun and waited for apart, with exact gradients.
//
// They run on buffers whose dim 0 counts parts:
//   all_gather      (1, N) -> (g, N)   adjoint: reduce_scatter (the consumers differ between ranks)
//   reduce_scatter  (g, N) -> (1, N)   adjoint: all_gather
//   all_to_all      (g, N) -> (g, N)   adjoint: all_to_all
// Gloo's own reduce_scatter sends as much as an all-reduce, so
// on the CPU it is an all_to_all and a local sum in rank order.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "group.h"

namespace two_level_mha {

using at::Tensor;

enum class Collective : int64_t { all_gather, reduce_scatter, all_to_all };

// What is on its way: called once, it waits, and gives what came. Other work may run until then. If it comes in stages,
// advance() waits for the one that was begun and begins the next; false: there is none.
template <class T>
class Later {
 public:
  Later() = default;
  template <class F, class = std::enable_if_t<std::is_invocable_r_v<T, F&>>>
  Later(F finish, std::function<bool()> advance = nullptr)
      : finish_(std::move(finish)), advance_(std::move(advance)) {}

  T operator()() const { return finish_(); }
  bool advance() const { return advance_ && advance_(); }
  explicit operator bool() const { return bool(finish_); }

 private:
  std::function<T()> finish_;
  std::function<bool()> advance_;
};

// f of what comes.
template <class T, class F>
auto then(Later<T> before, F f) -> Later<decltype(f(before()))> {
  auto shared = std::make_shared<Later<T>>(std::move(before));
  return {[shared, f = std::move(f)]() mutable { return f((*shared)()); },
          [shared] { return shared->advance(); }};
}

// What it gives, after which `later` is empty.
template <class T>
T arrived(Later<T>& later) {
  const Later<T> mine = std::exchange(later, {});
  return mine();
}

// What begins an exchange of tensors; and its adjoint, of a gradient, which gives those of the tensors.
using Begin = std::function<Later<Tensor>(const std::vector<Tensor>& xs)>;
using BeginBack = std::function<Later<std::vector<Tensor>>(const Tensor& gradient)>;

// Begins the exchange; what is returned is differentiable. In backward, where it stood the adjoint is begun, and waited
// for where this was called: exchanges that overlap forward do so backward.
Later<Tensor> begin(const std::vector<Tensor>& xs, Begin forward, BeginBack backward);

Later<Tensor> start(Collective kind, const Tensor& buffer, const Group& group);

// For backward passes whose own gradient would have to cross ranks: raises for a gradient that is part of a
// graph (create_graph=True), since gradients of gradients would be wrong without a word.
void once_differentiable(const Tensor& gradient);

// Sum over the group. Not differentiable: replicated.h has the differentiable forms. own: nobody else needs x, which
// may be written to; else it is a new tensor.
Tensor sum_in_group(const Tensor& x, const Group& group);
Later<Tensor> begin_sum_in_group(const Tensor& x, const Group& group, bool own);

// Rows of x for each rank in turn, `sent` of them -> the rows from each rank, `received`. Not differentiable.
Tensor exchange_rows(const Tensor& x, const std::vector<int64_t>& sent, const std::vector<int64_t>& received,
                     const Group& group);

// The same as `start` without autograd, for use inside autograd functions, and waited for at once.
Later<Tensor> begin_run(Collective kind, const Tensor& buffer, const Group& group);
Tensor run(Collective kind, const Tensor& buffer, const Group& group);

}  // namespace two_level_mha
