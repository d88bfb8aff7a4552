// dropout_mask.h as independent units of work: what the CUDA kernel runs, one unit a thread and step, and
// what tests run on the host. No torch.
#pragma once

#include <cstdint>

#include "../base/vector.h"
#include "dropout.h"

namespace two_level_mha {

struct DropoutMaskParams {
  const int64_t* seed;  // one element, read on the device
  bool* keep;           // (batches, heads, rows, columns), contiguous
  int64_t batches, heads, rows, columns;
  int64_t origin[3];  // global (batch, head, row) of element [0, 0, 0, 0]
  uint32_t threshold;
};

// One unit is a run of columns of one row: hashing the row costs as much as a few columns.
struct DropoutMaskWork {
  static constexpr int kRun = 16;  // bytes of the mask
  DropoutMaskParams params;

  int64_t units() const { return params.batches * params.heads * params.rows * runs(); }

  template <typename Index>
  TLM_HOST_DEVICE void operator()(Index unit) const {
    Index per_row = (Index)runs(), rows = (Index)params.rows, heads = (Index)params.heads;
    Index row = unit / per_row, first = unit % per_row * kRun;
    DropoutRow hashed = dropout_row(*params.seed, params.origin[0] + row / rows / heads,
                                    params.origin[1] + row / rows % heads, params.origin[2] + row % rows);
    bool* keep = params.keep + (int64_t)row * params.columns + first;
    Vector<bool, kRun> run;
    for (int i = 0; i < kRun; i++) run.x[i] = dropout_keep(hashed, (uint32_t)first + i, params.threshold);
    if (params.columns % kRun == 0) {
      *(Vector<bool, kRun>*)keep = run;
      return;
    }
    for (int i = 0; i < kRun; i++)
      if (first + i < params.columns) keep[i] = run.x[i];
  }

 private:
  TLM_HOST_DEVICE int64_t runs() const { return (params.columns + kRun - 1) / kRun; }
};

}  // namespace two_level_mha
