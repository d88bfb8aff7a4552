// The functions of csrc/attend/aten/cuda.cpp and chunked.cpp's for CUDA as operators that take CPU tensors, for tests
// that answer in the place of ATen's CUDA kernels; and which calls of norm_rotary its kernel would take.
#include <torch/library.h>
#include <two_level_mha/attend/aten/cuda.h>
#include <two_level_mha/attend/chunked.h>
#include <two_level_mha/head/norm_rotary.h>

namespace {

using namespace two_level_mha;
using Maybe = const std::optional<Tensor>&;

AttentionParams params_of(Maybe mask, double scale, std::optional<int64_t> causal,
                          std::optional<int64_t> window, int64_t key_stride, double softcap, double dropout_p,
                          Maybe seed) {
  AttentionParams params;
  params.scale = scale, params.softcap = softcap, params.dropout_p = dropout_p;
  params.causal = causal, params.window = window, params.key_stride = key_stride;
  if (mask) params.mask = *mask;
  if (seed) params.seed = *seed;
  return params;
}

Forward forward(std::string kernel, const Tensor& q, const Tensor& k, const Tensor& v, Maybe mask,
                double scale, std::optional<int64_t> causal, std::optional<int64_t> window,
                int64_t key_stride, double softcap, double dropout_p, Maybe seed) {
  const auto params = params_of(mask, scale, causal, window, key_stride, softcap, dropout_p, seed);
  if (kernel == "chunked") return chunked_forward(q, k, v, params, Halves::as_they_are);
  if (kernel == "aten_cudnn") return cudnn_forward(q, k, v, params);
  return (kernel == "aten_flash" ? flash_forward : efficient_forward)(q, k, v, params);
}

std::tuple<Tensor, Tensor, Tensor> backward(std::string kernel, const Tensor& grad_out, Maybe grad_logsumexp,
                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& logsumexp, Maybe mask,
                                            double scale, std::optional<int64_t> causal,
                                            std::optional<int64_t> window, int64_t key_stride, double softcap,
                                            double dropout_p, Maybe seed) {
  const auto params = params_of(mask, scale, causal, window, key_stride, softcap, dropout_p, seed);
  const Tensor g = grad_logsumexp.value_or(Tensor());
  const auto run = kernel == "aten_cudnn"   ? cudnn_backward
                   : kernel == "aten_flash" ? flash_backward
                                            : efficient_backward;
  const auto [dq, dk, dv, _] = kernel == "chunked" ? chunked_backward(grad_out, g, q, k, v, out, logsumexp,
                                                                      params, Halves::as_they_are)
                                                   : run(grad_out, g, q, k, v, out, logsumexp, params);
  return {dq, dk, dv};
}

bool one_kernel_of(const Tensor& q, const Tensor& k, std::vector<Tensor> weights,
                   std::vector<Tensor> q_angles, std::vector<Tensor> k_angles) {
  return one_kernel(q, k, weights, q_angles, k_angles);
}

#define OPTIONS                                                                                  \
  "Tensor? mask, float scale, int? causal, int? window, int key_stride, float softcap=0, float " \
  "dropout_p=0, "                                                                                \
  "Tensor? seed=None)"

}  // namespace

TORCH_LIBRARY(two_level_mha_cuda_kernels, library) {
  library.def(
      "one_kernel(Tensor q, Tensor k, Tensor[] weights, Tensor[] q_angles, Tensor[] k_angles) -> bool",
      one_kernel_of);
  library.def("forward(str kernel, Tensor q, Tensor k, Tensor v, " OPTIONS " -> (Tensor, Tensor)", forward);
  library.def(
      "backward(str kernel, Tensor grad_out, Tensor? grad_logsumexp, Tensor q, Tensor k, Tensor v, Tensor "
      "out, "
      "Tensor logsumexp, " OPTIONS " -> (Tensor, Tensor, Tensor)",
      backward);
}
