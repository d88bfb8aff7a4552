#include "norm_rotary.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include "norm.h"
#include "rotary.h"

namespace two_level_mha {

namespace {

// More than a pointer to numbers: a graph or a tangent of it, a trace, a sign that is not in memory.
bool needed(const Tensor& x) {
  return at::isTensorSubclassLike(x) || x.is_neg() || x._fw_grad(0).defined() ||
         (at::GradMode::is_enabled() && x.requires_grad());
}

bool dense(const Tensor& x) {
  return x.layout() == at::kStrided && (x.stride(-1) == 1 || x.size(-1) == 1);
}

// cos or sin of every token of x, in a dtype that the kernel takes with x's
bool angles_of(const Tensor& angle, const Tensor& x, const Tensor& cos) {
  const auto dtype = angle.scalar_type();
  return !needed(angle) && angle.device() == x.device() && angle.dim() == 4 && dense(angle) &&
         (dtype == x.scalar_type() ||
          (dtype == at::kFloat && (x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16))) &&
         (angle.size(0) == 1 || angle.size(0) == x.size(0)) && angle.size(1) == 1 &&
         angle.size(2) == x.size(2) && angle.sizes() == cos.sizes() && dtype == cos.scalar_type();
}

void check(const std::vector<Tensor>& xs, const char* name) {
  TORCH_CHECK_VALUE(xs.empty() || xs.size() == 2, name, " must be none or two tensors, got ", xs.size());
}

}  // namespace

bool one_kernel(const Tensor& q, const Tensor& k, const std::vector<Tensor>& weights,
                const std::vector<Tensor>& q_angles, const std::vector<Tensor>& k_angles) {
  const auto dtype = q.scalar_type();
  bool takes =
      !needed(q) && !needed(k) && q.dim() == 4 && k.dim() == 4 && dense(q) && dense(k) &&
      q.size(3) == k.size(3) && q.size(3) > 0 && k.scalar_type() == dtype && q.device() == k.device() &&
      (dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) &&
      q_angles.size() == k_angles.size() && (!weights.empty() || !q_angles.empty());
  for (const Tensor& weight : weights)
    takes = takes && !needed(weight) && weight.device() == q.device() && weight.dim() == 1 &&
            weight.size(0) == q.size(3);
  for (size_t i = 0; takes && i < q_angles.size(); ++i)
    takes = angles_of(q_angles[i], q, q_angles[0]) && angles_of(k_angles[i], k, k_angles[0]);
  if (takes && !q_angles.empty()) {
    const int64_t r = q_angles[0].size(3);
    takes = r > 0 && r % 2 == 0 && r <= q.size(3) && k_angles[0].size(3) == r &&
            k_angles[0].scalar_type() == q_angles[0].scalar_type();
  }
  return takes;
}

std::tuple<Tensor, Tensor> norm_rotary(const Tensor& q, const Tensor& k, const std::vector<Tensor>& weights,
                                       double eps, const std::vector<Tensor>& q_angles,
                                       const std::vector<Tensor>& k_angles, bool interleaved) {
  TORCH_CHECK_VALUE(!weights.empty() || !q_angles.empty(), "weights or angles must be given");
  check(weights, "weights"), check(q_angles, "q_angles"), check(k_angles, "k_angles");
#ifdef TLM_WITH_CUDA
  if (q.is_cuda() && one_kernel(q, k, weights, q_angles, k_angles))
    return norm_rotary_cuda(q, k, weights, eps, q_angles, k_angles, interleaved);
#endif
  auto of = [&](Tensor x, size_t which, const std::vector<Tensor>& angles) {
    if (!weights.empty()) x = head_norm(x, weights[which], eps);
    return angles.empty() ? x : rotary(x, angles[0], angles[1], interleaved);
  };
  return {of(q, 0, q_angles), of(k, 1, k_angles)};
}

}  // namespace two_level_mha
