// What the halves of the pass are made of, chunk after chunk of the batch, each until what it sends is waited for.
#pragma once

#include "grid_projection.h"
#include "inputs.h"
#include "pass.h"

namespace two_level_mha {

// The projections of chunk c, on their way into the layout of attention: q, k and v.
Later<std::vector<Tensor>> begin_enter(const GridProjection& projection, int64_t c, const ExtraKeys& extra,
                                       const Context& context);

// What `enter` gives beside q, k and v.
Entered enter_beside(const Inputs& inputs, const std::vector<Tensor>& rows, const std::vector<Tensor>& shared,
                     const Context& context);

// The second half, given one chunk after the other: while one is attended to, those before it move and are summed.
class Leaving {
 public:
  // The context and the options are the whole call's.
  Leaving(const Attend& attend, const OutWeights& out, const std::optional<Tensor>& sinks,
          const Context& context);
  void operator()(const Tensor& q, const Tensor& k, const Tensor& v,
                  const std::optional<Tensor>& gate = std::nullopt,
                  const std::optional<Tensor>& scores = std::nullopt);
  Tensor finish();

 private:
  bool advance();
  void combine();

  const OutWeights out_;
  const std::optional<Tensor> sinks_;
  const Context context_;
  const Chunking chunks_;
  const Attend attend_;
  const std::vector<std::optional<Tensor>> masks_;  // of the chunks
  std::vector<Later<Tensor>> moving_, combining_;
};

}  // namespace two_level_mha
