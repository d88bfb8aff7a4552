#include "cpu_mask.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>

#include "../host_device.h"
#include "cpu_panels.h"

namespace two_level_mha {

namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr int64_t kTile = 16;

TLM_HOST_DEVICE float bias(bool attend) {
  return attend ? 0.f : kHidden;
}
template <class T>
TLM_HOST_DEVICE float bias(T x) {
  return static_cast<float>(x);
}

// tile[i * ld + j] = bias(x[i * outer + j * inner]); the caller names the dims so that rows of the tile are
// j.
template <class T>
TLM_HOST_DEVICE bool load_body(const T* x, int64_t outer, int64_t inner, int64_t n, int64_t m, float* tile,
                               int64_t ld) {
  int any = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T* from = x + i * outer;
    float* to = tile + i * ld;
    if (inner == 1) {
#pragma omp simd reduction(| : any)
      for (int64_t j = 0; j < m; ++j) {
        to[j] = bias(from[j]);
        any |= !(to[j] == kHidden);
      }
    } else {
      for (int64_t j = 0; j < m; ++j) {
        to[j] = bias(from[j * inner]);
        any |= !(to[j] == kHidden);
      }
    }
  }
  return any;
}

// The same where x is contiguous along i: in tiles, so that both sides keep to their cache lines.
template <class T>
TLM_HOST_DEVICE bool load_across_body(const T* x, int64_t inner, int64_t n, int64_t m, float* tile,
                                      int64_t ld) {
  int any = 0;
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t last = std::min(first + kTile, n);
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = first; i < last; ++i) {
        const float value = bias(x[j * inner + i]);
        tile[i * ld + j] = value;
        any |= !(value == kHidden);
      }
  }
  return any;
}

#define TLM_LOAD(T)                                                                                      \
  TLM_CLONES bool load_tile(const T* x, int64_t outer, int64_t inner, int64_t n, int64_t m, float* tile, \
                            int64_t ld) {                                                                \
    return outer == 1 && inner != 1 ? load_across_body(x, inner, n, m, tile, ld)                         \
                                    : load_body(x, outer, inner, n, m, tile, ld);                        \
  }
TLM_LOAD(bool)
TLM_LOAD(float)
TLM_LOAD(double)
TLM_LOAD(c10::BFloat16)
TLM_LOAD(c10::Half)
#undef TLM_LOAD

bool load_any(at::ScalarType type, const void* x, int64_t outer, int64_t inner, int64_t n, int64_t m,
              float* tile, int64_t ld) {
  switch (type) {
    case at::kBool:
      return load_tile(static_cast<const bool*>(x), outer, inner, n, m, tile, ld);
    case at::kFloat:
      return load_tile(static_cast<const float*>(x), outer, inner, n, m, tile, ld);
    case at::kDouble:
      return load_tile(static_cast<const double*>(x), outer, inner, n, m, tile, ld);
    case at::kBFloat16:
      return load_tile(static_cast<const c10::BFloat16*>(x), outer, inner, n, m, tile, ld);
    default:
      return load_tile(static_cast<const c10::Half*>(x), outer, inner, n, m, tile, ld);
  }
}

}  // namespace

MaskView::MaskView(const at::Tensor& mask) : mask_(mask) {
  if (!mask.defined()) return;
  data_ = mask.data_ptr();
  for (int64_t dim = 0; dim < 4; ++dim) stride_[dim] = mask.size(dim) == 1 ? 0 : mask.stride(dim);
}

const void* MaskView::at(int64_t batch, int64_t head, int64_t row, int64_t key) const {
  const int64_t offset = batch * stride_[0] + head * stride_[1] + row * stride_[2] + key * stride_[3];
  return static_cast<const char*>(data_) + offset * mask_.element_size();
}

bool MaskView::load(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key, int64_t keys,
                    float* tile, int64_t ld) const {
  return load_any(mask_.scalar_type(), at(batch, head, row, key), stride_[2], stride_[3], rows, keys, tile,
                  ld);
}

bool MaskView::load_transposed(int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t key,
                               int64_t keys, float* tile, int64_t ld) const {
  return load_any(mask_.scalar_type(), at(batch, head, row, key), stride_[3], stride_[2], keys, rows, tile,
                  ld);
}

}  // namespace two_level_mha
