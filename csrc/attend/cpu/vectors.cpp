#include "vectors.h"

#include "../../base/host_device.h"
#include "store.h"
#include "vectorised.h"

namespace two_level_mha {

using c10::BFloat16;
using c10::Half;

namespace {

template <class T>
float dot_by_element(const T* a, const T* b, int64_t n) {
  float sum = 0.f;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return sum;
}

TLM_HOST_DEVICE float dot_body(const float* a, const float* b, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

void scale_row(const float* x, int64_t n, float factor, float* out) {
  vectorised([=]() TLM_INLINE {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
  });
}

void scale_row(const float* x, int64_t n, float factor, BFloat16* out) {
  vectorised([=]() TLM_INLINE {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out, i, x[i] * factor);
  });
}

void scale_row(const float* x, int64_t n, float factor, Half* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

void add_row(const float* x, int64_t n, float factor, float* out) {
  vectorised([=]() TLM_INLINE {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += factor * x[i];
  });
}

float dot(const float* a, const float* b, int64_t n) {
  return vectorised([=]() TLM_INLINE { return dot_body(a, b, n); });
}

void dot_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out) {
  vectorised([=]() TLM_INLINE {
    for (int64_t i = 0; i < n; ++i) out[i] = dot_body(x + i * ld, y, width);
  });
}

// Eight rows at a time, since each pass reads and writes `out`.
void add_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out) {
  vectorised([=]() TLM_INLINE {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      const float *a = x + i * ld, *f = factors + i;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j)
        out[j] += f[0] * a[j] + f[1] * a[j + ld] + f[2] * a[j + 2 * ld] + f[3] * a[j + 3 * ld] +
                  f[4] * a[j + 4 * ld] + f[5] * a[j + 5 * ld] + f[6] * a[j + 6 * ld] + f[7] * a[j + 7 * ld];
    }
    for (; i < n; ++i) {
      const float *a = x + i * ld, f = factors[i];
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) out[j] += f * a[j];
    }
  });
}

float dot(const BFloat16* a, const BFloat16* b, int64_t n) {
  return dot_by_element(a, b, n);
}
float dot(const Half* a, const Half* b, int64_t n) {
  return dot_by_element(a, b, n);
}

}  // namespace two_level_mha
