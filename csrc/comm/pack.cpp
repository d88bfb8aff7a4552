// The CPU side of pack and unpack, their shapes, and autograd: each is the other's adjoint.
#include "pack.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/safe_numerics.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../plan/traffic.h"

namespace two_level_mha {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::vector<Piece> make_pieces(const std::vector<std::vector<int64_t>>& sizes, at::IntArrayRef dims,
                               int64_t parts, bool zigzag) {
  std::vector<Piece> pieces;
  int64_t offset = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    pieces.push_back(make_piece(sizes[i].data(), sizes[i].size(), dims[i], parts, zigzag, offset));
    offset += piece_count(pieces.back());
  }
  return pieces;
}

namespace {

// Copies the rows of one sharded tensor between its own
// memory and part `part` of a buffer, inner runs at a time.
template <bool kPack>
void copy_part(std::conditional_t<kPack, const char*, char*> tensor,
               std::conditional_t<kPack, char*, const char*> part_start, const Piece& piece, int64_t part,
               int64_t parts, int64_t bytes) {
  const int64_t run = piece.inner * bytes;
  for (int64_t o = 0; o < piece.outer; ++o)
    for (int64_t c = 0; c < piece.chunks; ++c) {
      const int64_t first = source_row(piece, parts, part, c * piece.chunk);
      const int64_t count = std::clamp<int64_t>(piece.size - first, 0, piece.chunk);
      auto* packed = part_start + (o * piece.chunks + c) * piece.chunk * run;
      auto* own = tensor + (o * piece.size + first) * run;
      if constexpr (kPack) {
        std::memcpy(packed, own, count * run);
        std::memset(packed + count * run, 0, (piece.chunk - count) * run);
      } else {
        std::memcpy(own, packed, count * run);
      }
    }
}

void check_arguments(size_t tensors, at::IntArrayRef dims, int64_t parts) {
  TORCH_CHECK_VALUE(tensors > 0, "there must be at least one tensor");
  TORCH_CHECK_VALUE(tensors == dims.size(), "dims must have one entry per tensor (", tensors, "), got ",
                    dims.size());
  TORCH_CHECK_VALUE(parts >= 1 && parts <= kMaxRanks, "parts must be positive, at most ", kMaxRanks, ", got ",
                    parts);
  for (int64_t dim : dims)
    TORCH_CHECK_VALUE(dim >= -1 && dim < 4, "dims must be 0 .. 3, or -1 for all of a tensor, got ", dim);
}

void check_tensors(at::TensorList tensors, at::IntArrayRef dims, int64_t parts) {
  check_arguments(tensors.size(), dims, parts);
  for (const Tensor& x : tensors)
    TORCH_CHECK_VALUE(
        x.dim() == 4 && x.scalar_type() == tensors[0].scalar_type() && x.device() == tensors[0].device(),
        "pack takes 4-D tensors of one dtype and device, got ", x.dim(), "-D ", x.scalar_type(), " on ",
        x.device(), " beside ", tensors[0].scalar_type(), " on ", tensors[0].device());
}

}  // namespace

Tensor pack_cpu(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag) {
  std::vector<std::vector<int64_t>> sizes;
  for (const Tensor& x : tensors) sizes.push_back(x.sizes().vec());
  auto pieces = make_pieces(sizes, dims, parts, zigzag);
  const int64_t elements = part_elements(pieces);
  Tensor buffer = at::empty({parts, elements}, tensors[0].options());
  const int64_t bytes = buffer.element_size();
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;  // and perhaps no memory
    Tensor x = tensors[i].contiguous();
    const char* own = static_cast<const char*>(x.const_data_ptr());
    char* packed = static_cast<char*>(buffer.mutable_data_ptr());
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        char* part = packed + (t * elements + pieces[i].offset) * bytes;
        if (dims[i] < 0)
          std::memcpy(part, own, x.numel() * bytes);
        else
          copy_part<true>(own, part, pieces[i], t, parts, bytes);
      }
    });
  }
  return buffer;
}

std::vector<Tensor> unpack_cpu(const Tensor& buffer, const std::vector<std::vector<int64_t>>& sizes,
                               at::IntArrayRef dims, int64_t parts, bool zigzag) {
  Tensor from = buffer.contiguous();
  const int64_t bytes = from.element_size(), elements = from.size(1);
  auto pieces = make_pieces(sizes, dims, parts, zigzag);
  std::vector<Tensor> out;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (dims[i] < 0) {
      const int64_t count = c10::multiply_integers(sizes[i]);
      out.push_back(from.narrow(1, pieces[i].offset, count).sum(0, false, from.scalar_type()).view(sizes[i]));
      continue;
    }
    Tensor x = at::empty(sizes[i], from.options());
    out.push_back(x);
    if (x.numel() == 0) continue;
    char* own = static_cast<char*>(x.mutable_data_ptr());
    const char* packed = static_cast<const char*>(from.const_data_ptr());
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        copy_part<false>(own, packed + (t * elements + pieces[i].offset) * bytes, pieces[i], t, parts, bytes);
    });
  }
  return out;
}

namespace {

// The schema carries the sizes of all tensors as one flat list of rank-4 shapes.
template <class I>
std::vector<std::vector<I>> split_sizes(c10::ArrayRef<I> flat) {
  TORCH_CHECK_VALUE(flat.size() % 4 == 0, "sizes must hold four numbers per tensor, got ", flat.size());
  std::vector<std::vector<I>> sizes;
  for (size_t i = 0; i < flat.size(); i += 4) sizes.emplace_back(flat.begin() + i, flat.begin() + i + 4);
  for (const I& size : flat) {
    const auto number = known(size);
    TORCH_CHECK_VALUE(!number || *number >= 0, "sizes must not be negative, got ", flat);
  }
  return sizes;
}

// Raises ValueError where a product of the sizes does not fit: it would agree with a small buffer.
void check_elements(const std::vector<std::vector<int64_t>>& sizes) {
  for (const auto& shape : sizes) {
    uint64_t elements = 0;
    std::vector<uint64_t> factors;
    for (int64_t size : shape) factors.push_back(std::max<int64_t>(size, 1));
    TORCH_CHECK_VALUE(!c10::safe_multiplies_u64(factors, &elements) && elements >> 62 == 0,
                      "sizes of at most 2**62 elements are unpacked, got ", at::IntArrayRef(shape));
  }
}

using PackFunction = Tensor (*)(at::TensorList, at::IntArrayRef, int64_t, bool);
using UnpackFunction = std::vector<Tensor> (*)(const Tensor&, const std::vector<std::vector<int64_t>>&,
                                               at::IntArrayRef, int64_t, bool);

template <PackFunction kPack>
Tensor pack_checked(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag) {
  check_tensors(tensors, dims, parts);
  return kPack(tensors, dims, parts, zigzag);
}

template <UnpackFunction kUnpack>
std::vector<Tensor> unpack_flat(const Tensor& buffer, at::IntArrayRef flat, at::IntArrayRef dims,
                                int64_t parts, bool zigzag) {
  auto sizes = split_sizes<int64_t>(flat);
  check_arguments(sizes.size(), dims, parts);
  check_elements(sizes);
  const int64_t elements = part_elements(make_pieces(sizes, dims, parts, zigzag));
  TORCH_CHECK_VALUE(buffer.dim() == 2 && buffer.size(0) == parts && buffer.size(1) == elements,
                    "the buffer of these sizes must be (", parts, ", ", elements, "), got ", buffer.sizes());
  return kUnpack(buffer, sizes, dims, parts, zigzag);
}

Tensor pack_meta(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag) {
  check_tensors(tensors, dims, parts);
  c10::SymInt elements(0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    c10::SymInt count(1);
    for (int64_t dim = 0; dim < 4; ++dim) {
      const c10::SymInt size = tensors[i].sym_size(dim);
      count = count * (dim == dims[i] ? shard_rows(size, parts, zigzag && dim == 2) : size);
    }
    elements = elements + count;
  }
  return at::empty_symint({parts, elements}, tensors[0].options());
}

std::vector<Tensor> unpack_meta(const Tensor& buffer, c10::SymIntArrayRef sizes, at::IntArrayRef dims,
                                int64_t parts, bool) {
  std::vector<Tensor> out;
  auto all = split_sizes<c10::SymInt>(sizes);
  check_arguments(all.size(), dims, parts);
  for (const auto& size : all) out.push_back(at::empty_symint(size, buffer.options()));
  return out;
}

std::vector<c10::SymInt> flat_sizes(at::TensorList tensors) {
  std::vector<c10::SymInt> flat;
  for (const Tensor& x : tensors) flat.insert(flat.end(), x.sym_sizes().begin(), x.sym_sizes().end());
  return flat;
}

struct Pack : torch::autograd::Function<Pack> {
  static Tensor forward(AutogradContext* ctx, at::TensorList tensors, std::vector<int64_t> dims,
                        int64_t parts, bool zigzag) {
    ctx->saved_data["sizes"] = flat_sizes(tensors);
    ctx->saved_data["dims"] = dims;
    ctx->saved_data["parts"] = parts;
    ctx->saved_data["zigzag"] = zigzag;
    at::AutoDispatchBelowADInplaceOrView guard;
    return pack(tensors, dims, parts, zigzag);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto out =
        unpack(grads[0], ctx->saved_data["sizes"].toSymIntVector(), ctx->saved_data["dims"].toIntVector(),
               ctx->saved_data["parts"].toInt(), ctx->saved_data["zigzag"].toBool());
    out.resize(out.size() + 3);
    return out;
  }
};

struct Unpack : torch::autograd::Function<Unpack> {
  static variable_list forward(AutogradContext* ctx, const Tensor& buffer, std::vector<c10::SymInt> sizes,
                               std::vector<int64_t> dims, int64_t parts, bool zigzag) {
    ctx->saved_data["dims"] = dims;
    ctx->saved_data["parts"] = parts;
    ctx->saved_data["zigzag"] = zigzag;
    at::AutoDispatchBelowADInplaceOrView guard;
    return unpack(buffer, sizes, dims, parts, zigzag);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor buffer = pack(grads, ctx->saved_data["dims"].toIntVector(), ctx->saved_data["parts"].toInt(),
                         ctx->saved_data["zigzag"].toBool());
    return {buffer, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor pack_autograd(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag) {
  return Pack::apply(tensors, dims.vec(), parts, zigzag);
}

std::vector<Tensor> unpack_autograd(const Tensor& buffer, c10::SymIntArrayRef sizes, at::IntArrayRef dims,
                                    int64_t parts, bool zigzag) {
  return Unpack::apply(buffer, sizes.vec(), dims.vec(), parts, zigzag);
}

}  // namespace

Tensor pack(at::TensorList tensors, at::IntArrayRef dims, int64_t parts, bool zigzag) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("two_level_mha::pack", "")
                       .typed<Tensor(at::TensorList, at::IntArrayRef, int64_t, bool)>();
  return op.call(tensors, dims, parts, zigzag);
}

std::vector<Tensor> unpack(const Tensor& buffer, c10::SymIntArrayRef sizes, at::IntArrayRef dims,
                           int64_t parts, bool zigzag) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("two_level_mha::unpack", "")
          .typed<std::vector<Tensor>(const Tensor&, c10::SymIntArrayRef, at::IntArrayRef, int64_t, bool)>();
  return op.call(buffer, sizes, dims, parts, zigzag);
}

TORCH_LIBRARY_IMPL(two_level_mha, CPU, library) {
  library.impl("pack", pack_checked<pack_cpu>);
  library.impl("unpack", unpack_flat<unpack_cpu>);
}

#ifdef TLM_WITH_CUDA
TORCH_LIBRARY_IMPL(two_level_mha, CUDA, library) {
  library.impl("pack", pack_checked<pack_cuda>);
  library.impl("unpack", unpack_flat<unpack_cuda>);
}
#endif

TORCH_LIBRARY_IMPL(two_level_mha, Meta, library) {
  library.impl("pack", pack_meta);
  library.impl("unpack", unpack_meta);
}

TORCH_LIBRARY_IMPL(two_level_mha, Autograd, library) {
  library.impl("pack", pack_autograd);
  library.impl("unpack", unpack_autograd);
}

}  // namespace two_level_mha
