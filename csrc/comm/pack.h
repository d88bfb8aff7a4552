// Packing for one exchange inside a group of m ranks, and its adjoint.
//
// pack: a list of tensors -> one flat buffer (parts, N). Part
// t holds, tensor after tensor, what rank t shall receive:
//   dim >= 0  the t-th of `parts` pieces of the tensor along `dim`, ceil(size / parts) long, zeros beyond
//   dim == -1 all of the tensor (replicated to every part)
// unpack: a buffer (parts, N) whose part t came from rank t -> a list of tensors:
//   dim >= 0  the pieces concatenated along `dim` (cut to `size`)
//   dim == -1 the sum over the parts, in part order, accumulated in float32 (float64 for float64)
// With the same dims each is the other's adjoint.
//
// zigzag: pieces along dim 2 (rows) are sharded as chunks t and 2 * parts - 1 - t of 2 * parts chunks
// of ceil(size / (2 * parts)) rows, which balances causal attention.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "pack_index.h"

namespace two_level_mha {

// The geometry of the kernels for tensors of these sizes.
std::vector<Piece> make_pieces(const std::vector<std::vector<int64_t>>& sizes, at::IntArrayRef dims,
                               int64_t parts, bool zigzag);

// Elements of one part of their buffer.
inline int64_t part_elements(const std::vector<Piece>& pieces) {
  return pieces.back().offset + piece_count(pieces.back());
}

// The ops: differentiable, any device. Tensors are 4-D and of one
// dtype; `sizes` of unpack is their shapes, one after the other.
at::Tensor pack(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag);
std::vector<at::Tensor> unpack(const at::Tensor& buffer, c10::SymIntArrayRef sizes, at::IntArrayRef dims,
                               int64_t parts, bool zigzag);

at::Tensor pack_cpu(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag);
std::vector<at::Tensor> unpack_cpu(const at::Tensor& buffer, const std::vector<std::vector<int64_t>>& sizes,
                                   at::IntArrayRef dims, int64_t parts, bool zigzag);
at::Tensor pack_cuda(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag);
std::vector<at::Tensor> unpack_cuda(const at::Tensor& buffer, const std::vector<std::vector<int64_t>>& sizes,
                                    at::IntArrayRef dims, int64_t parts, bool zigzag);

}  // namespace two_level_mha
