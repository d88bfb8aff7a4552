#include "cpu_softmax.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu_panels.h"
#include "dropout.h"

namespace two_level_mha {

using c10::BFloat16;
using c10::Half;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693147181f;
constexpr float kLog2e = 1.44269504f;

// 2^t, relative error 2e-7; 0 below 2^-126. NaN stays NaN.
TLM_HOST_DEVICE float exp2_fast(float t) {
  const float clamped = t < -126.f ? -126.f : (t > 127.f ? 127.f : t);
  const float whole = __builtin_rintf(clamped), x = (clamped - whole) * kLn2;
  const float series =
      1.f + x * (1.f + x * (0.5f + x * (0.16666667f +
                                        x * (0.041666668f + x * (0.0083333338f + x * 0.0013888889f)))));
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return t < -126.f ? 0.f : series * power;
}

// The series near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
TLM_HOST_DEVICE float tanh_fast(float x) {
  const float y = x * x;
  const float series =
      x * (1.f + y * (-0.33333334f +
                      y * (0.13333334f + y * (-0.053968254f + y * (0.021869488f - y * 0.008863236f)))));
  const float far = 1.f - 2.f / (exp2_fast(x * (2.f * kLog2e)) + 1.f);
  return y < 0.09f ? series : far;
}

TLM_HOST_DEVICE void store(float* x, int64_t i, float value) {
  x[i] = value;
}

// Round to nearest even; NaN, whose low bits a carry could turn into infinity, gets a quiet bit.
TLM_HOST_DEVICE void store(BFloat16* x, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  reinterpret_cast<uint16_t*>(x)[i] = value != value ? 0x7fc0 : rounded;
}

template <class C>
TLM_HOST_DEVICE float softmax_step_body(float* s, Bias mask, int64_t n, float c, RunningSoftmax& running,
                                        C* p) {
  float max = running.max, sum = 0.f;
  if (const float* bias = mask.bias) {
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; ++i) {
      const float x = s[i] * mask.scale + bias[i];
      s[i] = x;
      max = x > max ? x : max;
    }
  } else {
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < n; ++i) max = s[i] > max ? s[i] : max;
  }
  const float shift = max == -kInfinity ? 0.f : max;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp2_fast((s[i] - shift) * c);
    sum += e;
    store(p, i, e);
  }
  const float factor =
      running.max == max || running.max == -kInfinity ? 1.f : std::exp2((running.max - max) * c);
  running.max = max;
  running.sum = running.sum * factor + sum;
  return factor;
}

template <class C>
TLM_HOST_DEVICE void softmax_grad_body(const float* s, Bias mask, const float* dp, const float* logsumexp,
                                       const float* delta, int64_t n, float c, C* p, C* ds) {
  if (const float* bias = mask.bias) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float e = exp2_fast((s[i] * mask.scale + bias[i] - logsumexp[i]) * c);
      store(p, i, e);
      store(ds, i, e * (dp[i] - delta[i]));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float e = exp2_fast((s[i] - logsumexp[i]) * c);
      store(p, i, e);
      store(ds, i, e * (dp[i] - delta[i]));
    }
  }
}

template <class T>
float dot_by_element(const T* a, const T* b, int64_t n) {
  float sum = 0.f;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<float>(a[i]) * static_cast<float>(b[i]);
  return sum;
}

}  // namespace

TLM_CLONES void cap_scores(float* s, int64_t n, float scale, float softcap, float* slope) {
  const float inner = scale / softcap;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float t = tanh_fast(s[i] * inner);
    s[i] = t * softcap;
    slope[i] = 1.f - t * t;
  }
}

TLM_CLONES float softmax_step(float* s, Bias mask, int64_t n, float c, RunningSoftmax& running, float* p) {
  return softmax_step_body(s, mask, n, c, running, p);
}

TLM_CLONES float softmax_step(float* s, Bias mask, int64_t n, float c, RunningSoftmax& running, BFloat16* p) {
  return softmax_step_body(s, mask, n, c, running, p);
}

TLM_CLONES void softmax_grad(const float* s, Bias mask, const float* dp, const float* logsumexp,
                             const float* delta, int64_t n, float c, float* p, float* ds) {
  softmax_grad_body(s, mask, dp, logsumexp, delta, n, c, p, ds);
}

TLM_CLONES void softmax_grad(const float* s, Bias mask, const float* dp, const float* logsumexp,
                             const float* delta, int64_t n, float c, BFloat16* p, BFloat16* ds) {
  softmax_grad_body(s, mask, dp, logsumexp, delta, n, c, p, ds);
}

TLM_CLONES void through_softcap(float* dp, const float* delta, const float* slope, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dp[i] = (dp[i] - delta[i]) * slope[i];
}

TLM_CLONES void drop_columns(float* x, int64_t n, uint32_t low, uint32_t high, uint32_t column,
                             uint32_t threshold) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    x[i] = dropout_keep({low, high}, column + static_cast<uint32_t>(i), threshold) ? x[i] : 0.f;
}

TLM_CLONES void drop_columns(BFloat16* x, int64_t n, uint32_t low, uint32_t high, uint32_t column,
                             uint32_t threshold) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    bits[i] &= dropout_keep({low, high}, column + static_cast<uint32_t>(i), threshold) ? 0xffff : 0;
}

TLM_CLONES void keep_bits(const uint32_t* low, const uint32_t* high, int64_t n, uint32_t column,
                          uint32_t threshold, uint32_t* bits) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bits[i] = dropout_keep({low[i], high[i]}, column, threshold) ? ~0u : 0u;
}

TLM_CLONES void drop_rows(float* x, int64_t n, const uint32_t* bits, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = bits[i] ? x[i] * factor : 0.f;
}

TLM_CLONES void drop_rows(BFloat16* x, int64_t n, const uint32_t* bits) {
  uint16_t* half = reinterpret_cast<uint16_t*>(x);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) half[i] &= static_cast<uint16_t>(bits[i]);
}

TLM_CLONES void scale_row(const float* x, int64_t n, float factor, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

TLM_CLONES void scale_row(const float* x, int64_t n, float factor, BFloat16* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out, i, x[i] * factor);
}

void scale_row(const float* x, int64_t n, float factor, Half* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor;
}

TLM_CLONES void add_row(const float* x, int64_t n, float factor, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += factor * x[i];
}

TLM_HOST_DEVICE float dot_body(const float* a, const float* b, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

TLM_CLONES float dot(const float* a, const float* b, int64_t n) {
  return dot_body(a, b, n);
}

TLM_CLONES void dot_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot_body(x + i * ld, y, width);
}

// Eight rows at a time, since each pass reads and writes `out`.
TLM_CLONES void add_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* factors,
                         float* out) {
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
}

float dot(const BFloat16* a, const BFloat16* b, int64_t n) {
  return dot_by_element(a, b, n);
}
float dot(const Half* a, const Half* b, int64_t n) {
  return dot_by_element(a, b, n);
}

}  // namespace two_level_mha
