// The attention mask, read as float32 biases: 0 or -inf for bool, the bias itself for floating point.
#pragma once

#include <ATen/core/Tensor.h>

namespace two_level_mha {

class MaskView {
 public:
  explicit MaskView(const at::Tensor& mask);  // undefined, or 4-D with sizes of 1 that broadcast

  bool defined() const { return data_ != nullptr; }
  bool one_row() const { return stride_[2] == 0; }  // whether all rows of a head are alike

  // Whether any of rows row .. row + rows sees any of keys key .. key + keys.
  bool any(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key, int64_t keys) const;
  // One row against keys key .. key + keys: where it is, or in the buffer.
  const float* row(int64_t batch, int64_t head, int64_t row, int64_t key, int64_t keys, float* buffer) const;
  // Brings rows begin .. end near, from this key on.
  void expect(int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t key) const;
  // Rows row .. row + rows against keys key .. key + keys as tile[s * ld + r].
  void load_transposed(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key, int64_t keys,
                       float* tile, int64_t ld) const;

 private:
  const void* at(int64_t batch, int64_t head, int64_t row, int64_t key) const;

  at::Tensor mask_;
  const void* data_ = nullptr;
  at::ScalarType type_ = at::kBool;
  int64_t size_ = 1, rows_ = 1;  // bytes of an element
  int64_t stride_[4] = {0, 0, 0, 0};
};

}  // namespace two_level_mha
