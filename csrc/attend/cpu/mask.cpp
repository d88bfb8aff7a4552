#include "mask.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "transpose.h"
#include "vectorised.h"

namespace two_level_mha {

namespace {

constexpr int64_t kAhead = 4;  // rows
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// A bool, as a byte and by integers, since loops over it vectorise: 1 becomes 0 and 0 becomes -inf.
TLM_HOST_DEVICE float bias(uint8_t attend) {
  const uint32_t bits = (attend - 1u) & 0xff800000u;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <class T>
TLM_HOST_DEVICE float bias(T x) {
  return static_cast<float>(x);
}

template <class T>
TLM_HOST_DEVICE void load_body(const T* x, int64_t stride, int64_t n, float* out) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = bias(x[i]);
  } else if (stride == 0) {
    std::fill_n(out, n, bias(*x));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = bias(x[i * stride]);
  }
}

// tile[i * ld + j] = bias(x[j * stride + i]), i < m, j < n
template <class T>
TLM_HOST_DEVICE void load_tile(const T* x, int64_t stride, int64_t n, int64_t m, float* tile, int64_t ld) {
  Line lines[kTile];
  for (int64_t j = 0; j < n; ++j) {
    float line[kTile] = {};
    for (int64_t i = 0; i < m; ++i) line[i] = bias(x[j * stride + i]);
    std::memcpy(&lines[j], line, sizeof(Line));
  }
  transpose_tile(lines);
  for (int64_t i = 0; i < m; ++i) std::memcpy(tile + i * ld, &lines[i], n * sizeof(float));
}

template <class T>
TLM_HOST_DEVICE void load_across_body(const T* x, int64_t stride, int64_t rows, int64_t keys, float* tile,
                                      int64_t ld) {
  for (int64_t j = 0; j < rows; j += kTile)
    for (int64_t i = 0; i < keys; i += kTile) {
      const T* from = x + j * stride + i;
      float* to = tile + i * ld + j;
      if (j + kTile <= rows && i + kTile <= keys)
        load_tile(from, stride, kTile, kTile, to, ld);
      else
        load_tile(from, stride, std::min(kTile, rows - j), std::min(kTile, keys - i), to, ld);
    }
}

template <class T>
void load(const T* x, int64_t stride, int64_t n, float* out) {
  vectorised([=]() TLM_INLINE { load_body(x, stride, n, out); });
}

template <class T>
void load_across(const T* x, int64_t stride, int64_t rows, int64_t keys, float* tile, int64_t ld) {
  vectorised([=]() TLM_INLINE { load_across_body(x, stride, rows, keys, tile, ld); });
}

// Calls run(T{}) with the element type of a mask.
template <class Run>
auto by_mask_type(at::ScalarType type, const Run& run) {
  switch (type) {
    case at::kBool:
      return run(uint8_t{});
    case at::kFloat:
      return run(float{});
    case at::kDouble:
      return run(double{});
    case at::kBFloat16:
      return run(c10::BFloat16{});
    default:
      return run(c10::Half{});
  }
}

template <class T>
bool hidden(T x) {
  return bias(x) == kHidden;
}

}  // namespace

MaskView::MaskView(const at::Tensor& mask) : mask_(mask) {
  if (!mask.defined()) return;
  data_ = mask.const_data_ptr();
  type_ = mask.scalar_type();
  size_ = mask.element_size();
  rows_ = mask.size(2);
  for (int64_t dim = 0; dim < 4; ++dim) stride_[dim] = mask.size(dim) == 1 ? 0 : mask.stride(dim);
}

const void* MaskView::at(int64_t batch, int64_t head, int64_t row, int64_t key) const {
  const int64_t offset = batch * stride_[0] + head * stride_[1] + row * stride_[2] + key * stride_[3];
  return static_cast<const char*>(data_) + offset * size_;
}

bool MaskView::any(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key, int64_t keys) const {
  if (stride_[2] == 0) rows = 1;
  if (stride_[3] == 0) keys = 1;
  return by_mask_type(type_, [&](auto element) {
    const auto* x = static_cast<const decltype(element)*>(at(batch, head, row, key));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < keys; ++s)
        if (!hidden(x[r * stride_[2] + s * stride_[3]])) return true;
    return false;
  });
}

const float* MaskView::row(int64_t batch, int64_t head, int64_t row, int64_t key, int64_t keys,
                           float* buffer) const {
  const void* data = at(batch, head, row, key);
  // Pieces of far apart rows: no hardware sees what is next.
  if (stride_[3] == 1 && row + kAhead < rows_) {
    const char* ahead = static_cast<const char*>(data) + kAhead * stride_[2] * size_;
    for (int64_t byte = 0; byte < keys * size_; byte += 64) __builtin_prefetch(ahead + byte);
  }
  if (type_ == at::kFloat && stride_[3] == 1) return static_cast<const float*>(data);
  by_mask_type(type_, [&](auto element) {
    load(static_cast<const decltype(element)*>(data), stride_[3], keys, buffer);
  });
  return buffer;
}

void MaskView::expect(int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t key) const {
  if (one_row() || begin >= end) return;
  const char* first = static_cast<const char*>(at(batch, head, begin, key));
  for (int64_t row = 0; row < end - begin; ++row) __builtin_prefetch(first + row * stride_[2] * size_, 0, 2);
}

void MaskView::load_transposed(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key,
                               int64_t keys, float* tile, int64_t ld) const {
  by_mask_type(type_, [&](auto element) {
    const auto* x = static_cast<const decltype(element)*>(at(batch, head, row, key));
    if (stride_[3] == 1 && stride_[2] != 0) return load_across(x, stride_[2], rows, keys, tile, ld);
    for (int64_t s = 0; s < keys; ++s) load(x + s * stride_[3], stride_[2], rows, tile + s * ld);
  });
}

}  // namespace two_level_mha
