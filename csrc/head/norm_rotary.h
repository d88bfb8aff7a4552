// Between the halves of the pass, what acts on every head's vector of q and of k at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace two_level_mha {

using at::Tensor;

// head_norm, then rotary, of q (B, H, L, d) and k (B, K, S, d). weights: none, or those of q's norm and of k's, (d,)
// each; angles: none, or cos and sin (B or 1, 1, length, r); not both none. On CUDA, where nothing is
// differentiated, one kernel that rounds less: a half precision product with half precision angles is not rounded
// before the sum.
std::tuple<Tensor, Tensor> norm_rotary(const Tensor& q, const Tensor& k, const std::vector<Tensor>& weights,
                                       double eps, const std::vector<Tensor>& q_angles,
                                       const std::vector<Tensor>& k_angles, bool interleaved);

// For norm_rotary on CUDA: the call's own checks are made, and one_kernel said so.
std::tuple<Tensor, Tensor> norm_rotary_cuda(const Tensor& q, const Tensor& k,
                                            const std::vector<Tensor>& weights, double eps,
                                            const std::vector<Tensor>& q_angles,
                                            const std::vector<Tensor>& k_angles, bool interleaved);

// Whether the kernel takes the call: dtypes, dense vectors, angles of every token, and nothing that a graph needs.
bool one_kernel(const Tensor& q, const Tensor& k, const std::vector<Tensor>& weights,
                const std::vector<Tensor>& q_angles, const std::vector<Tensor>& k_angles);

}  // namespace two_level_mha
