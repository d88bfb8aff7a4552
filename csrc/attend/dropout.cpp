#include "dropout.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "dropout_mask.h"

namespace two_level_mha {

at::Tensor dropout_keep_mask_cpu(const at::Tensor& seed, double p, at::IntArrayRef sizes,
                                 at::IntArrayRef origin) {
  at::Tensor keep = at::empty(sizes, seed.options().dtype(at::kBool));
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

}  // namespace two_level_mha
