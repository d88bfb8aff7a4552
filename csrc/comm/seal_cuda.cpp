// seal.h on CUDA. No call waits for the GPU.
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include "../base/launch.h"
#include "seal.h"
#include "seal_kernel.cuh"

namespace two_level_mha {

namespace {

// Calls run(Scalar()) with the kernels' type of a dtype that digits ride in.
template <typename Run>
void with_scalar(at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kDouble:
      return run(double());
    case at::kFloat:
      return run(float());
    case at::kHalf:
      return run(__half());
    default:
      return run(__nv_bfloat16());
  }
}

const uint64_t* number(const Tensor& hash) {
  TORCH_CHECK_VALUE(hash.is_cuda() && hash.numel() == 1 && hash.scalar_type() == at::kLong,
                    "seal must be an int64 tensor of one element on the GPU");
  return reinterpret_cast<const uint64_t*>(hash.const_data_ptr<int64_t>());
}

Tensor hash_cuda(at::TensorList xs, at::IntArrayRef numbers, std::string text,
                 const std::optional<Tensor>& before) {
  const at::Device device = before ? before->device() : xs[0].device();
  TORCH_CHECK_VALUE(xs.size() <= kMaxHashed, "xs must be at most ", kMaxHashed, " tensors, got ", xs.size());
  std::vector<int64_t> facts = numbers.vec();
  std::vector<Tensor> parts;
  HashWork work{};
  for (const Tensor& x : xs) {
    TORCH_CHECK_VALUE(x.device() == device && x.layout() == at::kStrided,
                      "xs must be strided tensors on one GPU");
    facts.insert(facts.end(), x.sizes().begin(), x.sizes().end());
    parts.push_back(once(x));
    work.add(parts.back().const_data_ptr(), int64_t(parts.back().nbytes()));
  }
  work.start = hash_of(facts, text);
  if (before) work.before = number(*before);
  Tensor hash = at::empty({}, at::TensorOptions(at::kLong).device(device));
  launch_on(hash, [&](int processors, cudaStream_t stream) {
    return launch_hash(work, reinterpret_cast<uint64_t*>(hash.mutable_data_ptr<int64_t>()), processors,
                       stream);
  });
  return hash;
}

Tensor digits_cuda(const Tensor& hash, at::ScalarType dtype, int64_t ranks) {
  const SealCode code = code_of(dtype, ranks);
  const uint64_t* from = number(hash);
  Tensor digits = at::empty({code.elements()}, hash.options().dtype(dtype));
  with_scalar(dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    launch_on(digits, [&](int, cudaStream_t stream) {
      auto* to = static_cast<Scalar*>(digits.mutable_data_ptr());
      return launch_digits(DigitsWork<Scalar>{from, to, code.bits, code.complement}, code.digits(), stream);
    });
  });
  return digits;
}

void verdict_cuda(const Tensor& sums, const Tensor& hash, int64_t ranks, const Tensor& verdict) {
  check_verdict(sums, hash, verdict, ranks);
  const SealCode code = code_of(sums.scalar_type(), ranks);
  with_scalar(sums.scalar_type(), [&](auto scalar) {
    using Scalar = decltype(scalar);
    const Tensor dense = sums.contiguous();
    const auto* from = static_cast<const Scalar*>(dense.const_data_ptr());
    const VerdictWork<Scalar> work{from,
                                   hash.const_data_ptr<int64_t>(),
                                   verdict.mutable_data_ptr<int64_t>(),
                                   ranks,
                                   code.digits(),
                                   code.complement};
    launch_on(sums, [&](int, cudaStream_t stream) { return launch_verdict(work, stream); });
  });
  // its memory is nobody else's before the kernel has run
  at::getHostAllocator(at::kCUDA)->record_event(verdict.data_ptr(),
                                                verdict.storage().data_ptr().get_context(),
                                                at::cuda::getCurrentCUDAStream(sums.get_device()).unwrap());
}

}  // namespace

TORCH_LIBRARY_IMPL(two_level_mha, CUDA, library) {
  library.impl("seal", hash_cuda);
  library.impl("seal_digits", digits_cuda);
  library.impl("seal_verdict", verdict_cuda);
}

}  // namespace two_level_mha
