#include "chunks.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/split_with_sizes.h>

namespace two_level_mha {

std::vector<Tensor> in_chunks(const Tensor& x, int64_t dim, const Chunking& chunks) {
  if (chunks.count == 1) return {x};
  const auto batch = x.sym_size(dim);
  if (chunks.parts == 1) {
    std::vector<c10::SymInt> sizes;
    for (int64_t c = 0; c < chunks.count; ++c)
      sizes.push_back(chunk_begin(chunks, batch, c + 1) - chunk_begin(chunks, batch, c));
    return at::split_with_sizes_symint(x, sizes, dim);
  }
  std::vector<Tensor> found =
      x.unflatten_symint(dim, {chunks.parts, chunks.count, batch / (chunks.parts * chunks.count)})
          .unbind(dim + 1);
  for (Tensor& chunk : found) chunk = chunk.flatten(dim, dim + 1);
  return found;
}

Tensor from_chunks(const std::vector<Tensor>& xs, int64_t dim, const Chunking& chunks) {
  if (chunks.count == 1) return xs[0];
  if (chunks.parts == 1) return at::cat(xs, dim);
  std::vector<Tensor> parts;
  for (const Tensor& x : xs)
    parts.push_back(x.unflatten_symint(dim, {c10::SymInt(chunks.parts), x.sym_size(dim) / chunks.parts}));
  return at::cat(parts, dim + 1).flatten(dim, dim + 1);
}

}  // namespace two_level_mha
