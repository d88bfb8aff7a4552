#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../base/grid_stride.cuh"
#include "merge_kernel.cuh"
#include "merge_row.h"

namespace two_level_mha {

namespace {

// One unit is N neighbouring columns of one row; whoever has a row's first columns writes its logsumexp. The
// few logsumexps of a row are read again by each of its units, from the cache.
template <typename Scalar, int N>
struct MergeWork {
  using Real = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;
  using Vec = Vector<Scalar, N>;
  MergeParams params;

  template <typename Index>
  __device__ void operator()(Index unit) const {
    Index units = (Index)(params.width / N);
    int64_t row = unit / units, column = unit % units;
    const Real* lses = (const Real*)params.lses + row;
    const Real merged = merged_logsumexp(lses, params.parts, params.rows);
    if (column == 0) ((Real*)params.lse)[row] = merged;

    Real sum[N] = {};
    const Vec* part = (const Vec*)params.outs + row * units + column;
    for (int64_t p = 0; p < params.parts; p++, part += params.rows * units) {
      Real lse = lses[p * params.rows];
      if (lse == -(Real)INFINITY) continue;
      Real weight = merge_weight(lse, merged);
      Vec x = *part;
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += weight * (Real)x.x[i];
    }
    Vec y;
#pragma unroll
    for (int i = 0; i < N; i++) y.x[i] = (Scalar)sum[i];
    ((Vec*)params.out)[row * units + column] = y;
  }
};

}  // namespace

template <typename Scalar>
cudaError_t launch_merge(const MergeParams& params, int multiprocessors, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(Scalar);
  bool aligned = params.width % N == 0 && ((uintptr_t)params.outs | (uintptr_t)params.out) % 16 == 0;
  if (aligned)
    return launch_grid_stride(MergeWork<Scalar, N>{params}, params.rows * (params.width / N), multiprocessors,
                              stream);
  return launch_grid_stride(MergeWork<Scalar, 1>{params}, params.rows * params.width, multiprocessors,
                            stream);
}

template cudaError_t launch_merge<double>(const MergeParams&, int, cudaStream_t);
template cudaError_t launch_merge<float>(const MergeParams&, int, cudaStream_t);
template cudaError_t launch_merge<__half>(const MergeParams&, int, cudaStream_t);
template cudaError_t launch_merge<__nv_bfloat16>(const MergeParams&, int, cudaStream_t);

}  // namespace two_level_mha
