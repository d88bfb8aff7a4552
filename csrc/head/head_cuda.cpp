#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../base/launch.h"
#include "head_kernel.cuh"
#include "norm_rotary.h"

namespace two_level_mha {

namespace {

template <typename Scalar>
const Scalar* data(const Tensor& x) {
  return static_cast<const Scalar*>(x.const_data_ptr());
}

int64_t step(const Tensor& x, int64_t dim) {
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

template <typename Scalar, typename Angle>
HeadSide<Scalar, Angle> side_of(const Tensor& x, const Tensor& y, const Tensor& weight,
                                const std::vector<Tensor>& angles) {
  HeadSide<Scalar, Angle> side{};
  side.x = data<Scalar>(x), side.y = static_cast<Scalar*>(y.mutable_data_ptr());
  side.weight = weight.defined() ? data<Scalar>(weight) : nullptr;
  for (int dim = 0; dim < 3; ++dim) side.stride[dim] = step(x, dim);
  side.heads = x.size(1), side.L = x.size(2), side.rows = x.size(0) * x.size(1) * x.size(2);
  if (angles.empty()) return side;
  side.cos = data<Angle>(angles[0]), side.sin = data<Angle>(angles[1]);
  for (int i = 0; i < 2; ++i) {
    side.cos_stride[i] = step(angles[0], 2 * i);
    side.sin_stride[i] = step(angles[1], 2 * i);
  }
  return side;
}

}  // namespace

std::tuple<Tensor, Tensor> norm_rotary_cuda(const Tensor& q, const Tensor& k,
                                            const std::vector<Tensor>& weights, double eps,
                                            const std::vector<Tensor>& q_angles,
                                            const std::vector<Tensor>& k_angles, bool interleaved) {
  const auto dtype = q.scalar_type();
  const Tensor q_weight = weights.empty() ? Tensor() : weights[0].to(dtype).contiguous();
  const Tensor k_weight = weights.empty() ? Tensor() : weights[1].to(dtype).contiguous();
  const Tensor y_q = at::empty(q.sizes(), q.options()), y_k = at::empty(k.sizes(), k.options());
  auto run = [&](auto scalar, auto angle) {
    using Scalar = decltype(scalar);
    using Angle = decltype(angle);
    using Work = HeadWork<Scalar, Angle>;
    const Work work{{side_of<Scalar, Angle>(q, y_q, q_weight, q_angles),
                     side_of<Scalar, Angle>(k, y_k, k_weight, k_angles)},
                    q.size(3),
                    q_angles.empty() ? 0 : q_angles[0].size(3),
                    typename Work::Real(eps),
                    interleaved};
    launch_on(q, [&](int processors, cudaStream_t stream) { return launch_head(work, processors, stream); });
  };
  const bool float_angles = !q_angles.empty() && q_angles[0].scalar_type() == at::kFloat;
  switch (dtype) {
    case at::kDouble:
      run(double(), double());
      break;
    case at::kFloat:
      run(float(), float());
      break;
    case at::kHalf:
      float_angles ? run(__half(), float()) : run(__half(), __half());
      break;
    default:
      float_angles ? run(__nv_bfloat16(), float()) : run(__nv_bfloat16(), __nv_bfloat16());
  }
  return {y_q, y_k};
}

}  // namespace two_level_mha
