#include "../base/grid_stride.cuh"
#include "dropout.h"
#include "dropout_kernel.cuh"

namespace two_level_mha {

namespace {

constexpr int kRun = 16;  // bytes of the mask that one unit writes

// One unit is a run of columns of one row: hashing the row costs as much as a few columns.
struct DropoutMaskWork {
  DropoutMaskParams params;

  template <typename Index>
  __device__ void operator()(Index unit) const {
    Index runs = (Index)((params.columns + kRun - 1) / kRun), rows = (Index)params.rows,
          heads = (Index)params.heads;
    Index row = unit / runs, first = unit % runs * kRun;
    DropoutRow hashed = dropout_row(*params.seed, params.origin[0] + row / rows / heads,
                                    params.origin[1] + row / rows % heads, params.origin[2] + row % rows);
    bool* keep = params.keep + (int64_t)row * params.columns + first;
    Vector<bool, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; i++) run.x[i] = dropout_keep(hashed, (uint32_t)first + i, params.threshold);
    if (params.columns % kRun == 0) {
      *(Vector<bool, kRun>*)keep = run;
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; i++)
      if (first + i < params.columns) keep[i] = run.x[i];
  }
};

}  // namespace

cudaError_t launch_dropout_mask(const DropoutMaskParams& params, int multiprocessors, cudaStream_t stream) {
  int64_t runs = (params.columns + kRun - 1) / kRun;
  return launch_grid_stride(DropoutMaskWork{params}, params.batches * params.heads * params.rows * runs,
                            multiprocessors, stream);
}

}  // namespace two_level_mha
