// Collectives inside one group of ranks, each as a start / wait pair with exact gradients.
//
// They run on buffers whose dim 0 counts parts:
//   all_gather      (1, N) -> (g, N)   adjoint: reduce_scatter (the consumers differ between ranks)
//   reduce_scatter  (g, N) -> (1, N)   adjoint: all_gather
//   all_to_all      (g, N) -> (g, N)   adjoint: all_to_all
// Gloo's own reduce_scatter sends as much as an all-reduce, so
// on the CPU it is an all_to_all and a local sum in rank order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include "group.h"

namespace two_level_mha {

using at::Tensor;

enum class Collective : int64_t { all_gather, reduce_scatter, all_to_all };

// What the two halves of one exchange share: the group, and the gradient under way.
struct Flight : torch::CustomClassHolder {
  Group group;
  Tensor gradient;

  explicit Flight(const Group& group) : group(group) {}
};

// An exchange under way: other work may run until wait() is
// called, forward and (in the reverse order) backward.
struct Exchange {
  Tensor started;
  Collective kind;
  c10::intrusive_ptr<Flight> flight;

  Tensor wait() const;
};

Exchange start(Collective kind, const Tensor& buffer, const Group& group);

// For backward passes whose own gradient would have to cross ranks: raises for a gradient that is part of a
// graph (create_graph=True), since gradients of gradients would be wrong without a word.
void once_differentiable(const Tensor& gradient);

// Sum over the group, as a new tensor. Not differentiable: replicated.h has the differentiable forms.
Tensor sum_in_group(const Tensor& x, const Group& group);

// The same of a buffer that nobody else needs, in place.
Tensor sum_in_group_(const Tensor& x, const Group& group);

// Rows of x for each rank in turn, `sent` of them -> the rows from each rank, `received`. Not differentiable.
Tensor exchange_rows(const Tensor& x, const std::vector<int64_t>& sent, const std::vector<int64_t>& received,
                     const Group& group);

// The same as `start` and `wait` without autograd, for use inside autograd functions.
Tensor run(Collective kind, const Tensor& buffer, const Group& group);

}  // namespace two_level_mha
