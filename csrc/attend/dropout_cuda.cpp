#include <ATen/ops/empty.h>

#include "../base/launch.h"
#include "dropout.h"
#include "dropout_kernel.cuh"
#include "dropout_mask.h"

namespace two_level_mha {

at::Tensor dropout_keep_mask_cuda(const at::Tensor& seed, double p, at::IntArrayRef sizes,
                                  at::IntArrayRef origin) {
  at::Tensor keep = at::empty(sizes, seed.options().dtype(at::kBool));
  DropoutMaskParams params{seed.const_data_ptr<int64_t>(),
                           keep.mutable_data_ptr<bool>(),
                           sizes[0],
                           sizes[1],
                           sizes[2],
                           sizes[3],
                           {origin[0], origin[1], origin[2]},
                           dropout_threshold(p)};
  launch_on(keep, [&](int processors, cudaStream_t stream) {
    return launch_dropout_mask(params, processors, stream);
  });
  return keep;
}

}  // namespace two_level_mha
