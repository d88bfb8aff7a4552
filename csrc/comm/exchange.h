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
#include <vector>

#include "group.h"

namespace two_level_mha {

using at::Tensor;

enum class Collective : int64_t { all_gather, reduce_scatter, all_to_all };

// What is on its way: called once, it waits, and gives what came. Other work may run until then.
template <class T>
using Later = std::function<T()>;

// What it gives, after which `later` is empty.
template <class T>
T arrived(Later<T>& later) {
  Later<T> mine = std::move(later);
  later = nullptr;
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
