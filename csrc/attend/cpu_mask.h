// The attention mask, read block by block as float32: 0 or -inf for bool, the bias for floating point.
#pragma once

#include <ATen/core/Tensor.h>

namespace two_level_mha {

class MaskView {
 public:
  explicit MaskView(const at::Tensor& mask);  // undefined, or 4-D with sizes of 1 that broadcast

  bool defined() const { return data_ != nullptr; }

  // Rows row .. row + rows against keys key .. key + keys as tile[r * ld + s]. Returns whether any is
  // visible.
  bool load(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key, int64_t keys, float* tile,
            int64_t ld) const;
  // The same as tile[s * ld + r].
  bool load_transposed(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key, int64_t keys,
                       float* tile, int64_t ld) const;

 private:
  const void* at(int64_t batch, int64_t head, int64_t row, int64_t key) const;

  at::Tensor mask_;
  const void* data_ = nullptr;
  int64_t stride_[4] = {0, 0, 0, 0};
};

}  // namespace two_level_mha
