// The projections on a grid of several ranks, of inputs that are whole on every rank or split over the grid
// (comm/split.h), in chunks of the batch.
#pragma once

#include "chunks.h"
#include "context.h"
#include "inputs.h"
#include "projection.h"

namespace two_level_mha {

// This rank's parts (B, length, D), or with batch and length swapped -> whole inputs, batch first, that every rank uses
// alike: the gradient is this rank's part of the whole's.
std::vector<Tensor> whole_inputs(const Inputs& inputs, const Context& context);

struct ProjectionState;

// Begins to gather inputs that are split, each chunk when the one before has come. Then the product of one chunk after the other, as
// qkv_projection gives it, batch first if the inputs are split: of all tokens, or where the call takes parts of those of
// this rank's slice.
//
// Backward begins the sum of a chunk's input gradients over the ranks as soon as they are computed; then come the
// weights' gradients, of all chunks in one product, and last the sums are waited for. Of split inputs the parts alone
// are kept, and gathered once more for the weights.
class GridProjection {
 public:
  GridProjection(const Inputs& inputs, const QkvWeights& weights, const Context& context,
                 const Chunking& chunks);
  ~GridProjection();
  GridProjection(const GridProjection&) = delete;
  std::tuple<Tensor, Tensor, Tensor> operator()(int64_t chunk) const;

 private:
  c10::intrusive_ptr<ProjectionState> shared_;
  std::vector<Tensor> begun_;    // the inputs of chunk 0, of chunk 1, ..
  std::vector<Tensor> weights_;  // and biases
};

}  // namespace two_level_mha
