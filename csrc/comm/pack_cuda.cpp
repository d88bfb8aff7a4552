// pack.h on CUDA: one launch for all tensors of a call. Strides are free.
#include <ATen/ops/empty.h>

#include "../base/launch.h"
#include "pack.h"
#include "pack_kernel.cuh"

namespace two_level_mha {

namespace {

// PackParams is one struct for both ways and has no const: an input that is a copy on write must stay one.
using DataOf = void* (*)(const at::Tensor&);

void* read_only(const at::Tensor& x) {
  return const_cast<void*>(x.const_data_ptr());
}

void* writable(const at::Tensor& x) {
  return x.mutable_data_ptr();
}

PackParams make_params(const at::Tensor& buffer, DataOf buffer_data, at::TensorList tensors,
                       DataOf tensor_data, at::IntArrayRef dims, int64_t parts,
                       const std::vector<Piece>& pieces, bool zigzag) {
  TORCH_CHECK(tensors.size() <= kMaxPacked, "at most ", kMaxPacked, " tensors in one exchange, got ",
              tensors.size());
  PackParams p{(char*)buffer_data(buffer), parts, buffer.size(1), (int32_t)tensors.size(), {}};
  for (size_t i = 0; i < tensors.size(); i++) {
    const at::Tensor& x = tensors[i];
    p.tensors[i] = make_packed(tensor_data(x), x.sizes().data(), x.strides().data(), (int)x.dim(), dims[i],
                               parts, zigzag, pieces[i].offset);
  }
  return p;
}

SumType sum_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return SumType::float64;
    case at::kFloat:
      return SumType::float32;
    case at::kHalf:
      return SumType::float16;
    case at::kBFloat16:
      return SumType::bfloat16;
    default:
      TORCH_CHECK_VALUE(false, "a sum over parts needs a floating point dtype, got ", dtype);
  }
}

}  // namespace

at::Tensor pack_cuda(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag) {
  std::vector<std::vector<int64_t>> sizes;
  for (const at::Tensor& x : tensors) sizes.push_back(x.sizes().vec());
  auto pieces = make_pieces(sizes, dims, parts, zigzag);
  at::Tensor buffer = at::empty({parts, part_elements(pieces)}, tensors[0].options());
  PackParams params = make_params(buffer, writable, tensors, read_only, dims, parts, pieces, zigzag);
  int64_t unit = make_units(params, buffer.element_size());
  launch_on(buffer, [&](int processors, cudaStream_t stream) {
    return launch_pack(params, unit, processors, stream);
  });
  return buffer;
}

std::vector<at::Tensor> unpack_cuda(const at::Tensor& buffer, const std::vector<std::vector<int64_t>>& sizes,
                                    at::IntArrayRef dims, int64_t parts, bool zigzag) {
  at::Tensor from = buffer.contiguous();
  auto pieces = make_pieces(sizes, dims, parts, zigzag);
  std::vector<at::Tensor> out;
  for (const auto& size : sizes) out.push_back(at::empty(size, from.options()));
  PackParams params = make_params(from, read_only, out, writable, dims, parts, pieces, zigzag);
  int64_t unit = make_units(params, from.element_size());
  bool sums = false;
  for (int64_t dim : dims) sums = sums || dim < 0;
  SumType type = sums ? sum_type(from.scalar_type()) : SumType::none;
  launch_on(from, [&](int processors, cudaStream_t stream) {
    return launch_unpack(params, unit, type, processors, stream);
  });
  return out;
}

}  // namespace two_level_mha
