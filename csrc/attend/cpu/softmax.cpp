#include "softmax.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "../../base/host_device.h"
#include "store.h"
#include "vectorised.h"

namespace two_level_mha {

using c10::BFloat16;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f;

// 2^t for t <= 127, relative error 3e-7; 0 below 2^-127. NaN stays NaN.
TLM_HOST_DEVICE float exp2_fast(float t) {
  // Adding it rounds to an integer, which is then in the lowest bits; what is above leaves by the shift.
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23
  const float clamped = t < -127.f ? -127.f : t;
  const float shifted = clamped + kRound, x = clamped - (shifted - kRound);
  const float series =
      1.f + x * (0.69314718f +
                 x * (0.24022651f +
                      x * (0.055504109f + x * (0.0096181291f + x * (0.0013333558f + x * 0.00015403530f)))));
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return series * power;
}

// For any t.
TLM_HOST_DEVICE float exp2_safe(float t) {
  return exp2_fast(t > 127.f ? 127.f : t);
}

// The series near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
TLM_HOST_DEVICE float tanh_fast(float x) {
  const float y = x * x;
  const float series =
      x * (1.f + y * (-0.33333334f +
                      y * (0.13333334f + y * (-0.053968254f + y * (0.021869488f - y * 0.008863236f)))));
  const float far = 1.f - 2.f / (exp2_safe(x * (2.f * kLog2e)) + 1.f);
  return y < 0.09f ? series : far;
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
      const float e = exp2_safe((s[i] * mask.scale + bias[i] - logsumexp[i]) * c);
      store(p, i, e);
      store(ds, i, e * (dp[i] - delta[i]));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float e = exp2_safe((s[i] - logsumexp[i]) * c);
      store(p, i, e);
      store(ds, i, e * (dp[i] - delta[i]));
    }
  }
}

}  // namespace

void cap_scores(float* s, int64_t n, float scale, float softcap, float* slope) {
  vectorised([=]() TLM_INLINE {
    const float inner = scale / softcap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float t = tanh_fast(s[i] * inner);
      s[i] = t * softcap;
      slope[i] = 1.f - t * t;
    }
  });
}

float softmax_step(float* s, Bias mask, int64_t n, float c, RunningSoftmax& running, float* p) {
  return vectorised([=, &running]() TLM_INLINE { return softmax_step_body(s, mask, n, c, running, p); });
}

float softmax_step(float* s, Bias mask, int64_t n, float c, RunningSoftmax& running, BFloat16* p) {
  return vectorised([=, &running]() TLM_INLINE { return softmax_step_body(s, mask, n, c, running, p); });
}

void softmax_grad(const float* s, Bias mask, const float* dp, const float* logsumexp, const float* delta,
                  int64_t n, float c, float* p, float* ds) {
  vectorised([=]() TLM_INLINE { softmax_grad_body(s, mask, dp, logsumexp, delta, n, c, p, ds); });
}

void softmax_grad(const float* s, Bias mask, const float* dp, const float* logsumexp, const float* delta,
                  int64_t n, float c, BFloat16* p, BFloat16* ds) {
  vectorised([=]() TLM_INLINE { softmax_grad_body(s, mask, dp, logsumexp, delta, n, c, p, ds); });
}

void through_softcap(float* dp, const float* delta, const float* slope, int64_t n) {
  vectorised([=]() TLM_INLINE {
    for (int64_t i = 0; i < n; ++i) dp[i] = (dp[i] - delta[i]) * slope[i];
  });
}

}  // namespace two_level_mha
