#pragma once

#include "grid.h"
#include "move/exchange.h"
#include "schemes.h"

#include <optional>

namespace two_level_mha {

// Where this rank is and how its layer runs; the same on every rank but for the two coordinates.
struct Place {
  Grid grid;
  int64_t head_group = 0, slice = 0;  // (i, j)
  Groups groups;
  Scheme scheme = Scheme::automatic;
  bool causal = false;  // rows are dealt out as balanced pairs of chunks
  bool whole_heads =
      false;            // how the query side is stored: W_Q (H / m, d, D) instead of (H, E, D), W_O alike
  bool concat = false;  // combine="concat"
  std::optional<at::ScalarType> reduce_dtype;
};

}  // namespace two_level_mha
