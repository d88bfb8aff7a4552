#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../base/launch.h"
#include "merge.h"
#include "merge_kernel.cuh"

namespace two_level_mha {

std::tuple<at::Tensor, at::Tensor> merge_partials_cuda(const at::Tensor& outs, const at::Tensor& logsumexps) {
  at::Tensor from = outs.contiguous(), lses = logsumexps.contiguous();
  at::Tensor out = at::empty(outs.sizes().slice(1), outs.options());
  at::Tensor lse = at::empty(logsumexps.sizes().slice(1), logsumexps.options());
  if (out.size(3) == 0) return {out, lses.logsumexp(0)};  // no column, so no thread, to write it
  MergeParams params{from.const_data_ptr(),
                     lses.const_data_ptr(),
                     out.mutable_data_ptr(),
                     lse.mutable_data_ptr(),
                     outs.size(0),
                     lse.numel(),
                     outs.size(4)};
  launch_on(out, [&](int processors, cudaStream_t stream) {
    switch (outs.scalar_type()) {
      case at::kDouble:
        return launch_merge<double>(params, processors, stream);
      case at::kFloat:
        return launch_merge<float>(params, processors, stream);
      case at::kHalf:
        return launch_merge<__half>(params, processors, stream);
      case at::kBFloat16:
        return launch_merge<__nv_bfloat16>(params, processors, stream);
      default:
        TORCH_CHECK_VALUE(false, "outs must be floating point, got ", outs.scalar_type());
    }
  });
  return {out, lse};
}

}  // namespace two_level_mha
