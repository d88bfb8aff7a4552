// The CPU side of dropout_mask.h, its shapes, and the op.
#include "dropout_mask.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "dropout.h"

namespace two_level_mha {

using at::Tensor;

Tensor dropout_keep_mask_cpu(const Tensor& seed, double p, at::IntArrayRef sizes, at::IntArrayRef origin) {
  Tensor keep = at::empty(sizes, seed.options().dtype(at::kBool));
  if (keep.numel() == 0) return keep;  // its other sizes may be anything
  int64_t heads = sizes[1], rows = sizes[2], columns = sizes[3];
  int64_t key = *seed.const_data_ptr<int64_t>();
  uint32_t threshold = dropout_threshold(p);
  bool* data = keep.mutable_data_ptr<bool>();
  at::parallel_for(0, sizes[0] * heads * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      DropoutRow row = dropout_row(key, origin[0] + i / (heads * rows), origin[1] + i / rows % heads,
                                   origin[2] + i % rows);
      for (int64_t s = 0; s < columns; s++) data[i * columns + s] = dropout_keep(row, (uint32_t)s, threshold);
    }
  });
  return keep;
}

namespace {

template <auto kMask>
Tensor checked(const Tensor& seed, double p, at::IntArrayRef sizes, at::IntArrayRef origin) {
  TORCH_CHECK_VALUE(seed.numel() == 1 && seed.scalar_type() == at::kLong,
                    "seed must be an int64 tensor of one element, got ", seed.numel(), " of ",
                    seed.scalar_type());
  TORCH_CHECK_VALUE(sizes.size() == 4 && origin.size() == 3,
                    "sizes must be (b, h, l, s) and origin (batch, head, row), got ", sizes.size(), " and ",
                    origin.size(), " numbers");
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, "p must be in [0, 1], got ", p);
  return kMask(seed, p, sizes, origin);
}

Tensor dropout_keep_mask_meta(const Tensor& seed, double, c10::SymIntArrayRef sizes, c10::SymIntArrayRef) {
  return at::empty_symint(sizes, seed.options().dtype(at::kBool));
}

}  // namespace

Tensor dropout_keep_mask(const Tensor& seed, double p, c10::SymIntArrayRef sizes,
                         c10::SymIntArrayRef origin) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("two_level_mha::dropout_keep_mask", "")
                       .typed<Tensor(const Tensor&, double, c10::SymIntArrayRef, c10::SymIntArrayRef)>();
  return op.call(seed, p, sizes, origin);
}

TORCH_LIBRARY_IMPL(two_level_mha, CPU, library) {
  library.impl("dropout_keep_mask", checked<dropout_keep_mask_cpu>);
}

#ifdef TLM_WITH_CUDA
TORCH_LIBRARY_IMPL(two_level_mha, CUDA, library) {
  library.impl("dropout_keep_mask", checked<dropout_keep_mask_cuda>);
}
#endif

TORCH_LIBRARY_IMPL(two_level_mha, Meta, library) {
  library.impl("dropout_keep_mask", dropout_keep_mask_meta);
}

}  // namespace two_level_mha
