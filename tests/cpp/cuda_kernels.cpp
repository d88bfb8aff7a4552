// The functions of csrc/attend/aten/cuda.cpp as operators that take CPU tensors, for tests that answer in the place of
// ATen's CUDA kernels.
#include <torch/library.h>
#include <two_level_mha/attend/aten/cuda.h>

namespace {

using namespace two_level_mha;
using Mask = const std::optional<Tensor>&;

AttentionParams params_of(Mask mask, double scale, std::optional<int64_t> causal,
                          std::optional<int64_t> window, int64_t key_stride) {
  AttentionParams params;
  params.scale = scale;
  params.causal = causal, params.window = window, params.key_stride = key_stride;
  if (mask) params.mask = *mask;
  return params;
}

Forward forward(std::string kernel, const Tensor& q, const Tensor& k, const Tensor& v, Mask mask,
                double scale, std::optional<int64_t> causal, std::optional<int64_t> window,
                int64_t key_stride) {
  const auto params = params_of(mask, scale, causal, window, key_stride);
  if (kernel == "aten_cudnn") return cudnn_forward(q, k, v, params);
  return (kernel == "aten_flash" ? flash_forward : efficient_forward)(q, k, v, params);
}

std::tuple<Tensor, Tensor, Tensor> backward(std::string kernel, const Tensor& grad_out, Mask grad_logsumexp,
                                            const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& logsumexp, Mask mask,
                                            double scale, std::optional<int64_t> causal,
                                            std::optional<int64_t> window, int64_t key_stride) {
  const auto params = params_of(mask, scale, causal, window, key_stride);
  const auto run = kernel == "aten_flash" ? flash_backward : efficient_backward;
  const auto [dq, dk, dv, _] =
      run(grad_out, grad_logsumexp.value_or(Tensor()), q, k, v, out, logsumexp, params);
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY(two_level_mha_cuda_kernels, library) {
  library.def(
      "forward(str kernel, Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, int? causal, int? "
      "window, "
      "int key_stride) -> (Tensor, Tensor)",
      forward);
  library.def(
      "backward(str kernel, Tensor grad_out, Tensor? grad_logsumexp, Tensor q, Tensor k, Tensor v, Tensor "
      "out, "
      "Tensor logsumexp, Tensor? mask, float scale, int? causal, int? window, int key_stride) -> (Tensor, "
      "Tensor, "
      "Tensor)",
      backward);
}
