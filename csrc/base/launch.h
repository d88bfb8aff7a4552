// From torch to a kernel's launch: device, stream, number of multiprocessors, error.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

namespace two_level_mha {

// Calls launch(multiprocessors, stream) with `on`'s device current and its current stream.
template <typename Launch>
void launch_on(const at::Tensor& on, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(on.device());
  C10_CUDA_CHECK(
      launch(at::cuda::getCurrentDeviceProperties()->multiProcessorCount, at::cuda::getCurrentCUDAStream()));
}

}  // namespace two_level_mha
