// Passes over one row of a block of scores. A row of the forward runs over keys; a row of the backward
// belongs to one key and runs over queries, so that logsumexp and delta lie along it.
#pragma once

#include <c10/util/BFloat16.h>

#include <cmath>
#include <cstdint>

namespace two_level_mha {

struct RunningSoftmax {
  float max, sum;
  float logsumexp(float unit) const { return max * unit + std::log(sum); }  // max is in units of raw scores
};

// Where a row of the mask is given, scores are raw products still: x = s * scale + bias. Else x = s.
struct Bias {
  const float* bias = nullptr;
  float scale = 1.f;
};

// s = softcap * tanh(scale * s / softcap), and the derivative of that.
void cap_scores(float* s, int64_t n, float scale, float softcap, float* slope);

// p = exp2(c * (x - max)); updates the running max (in units of x) and sum, and returns what earlier results
// must be multiplied by. A row of -inf gives p = 0. s is overwritten.
float softmax_step(float* s, Bias mask, int64_t n, float c, RunningSoftmax& running, float* p);
float softmax_step(float* s, Bias mask, int64_t n, float c, RunningSoftmax& running, c10::BFloat16* p);

// p = exp2(c * (x - logsumexp)) and ds = p * (dp - delta)
void softmax_grad(const float* s, Bias mask, const float* dp, const float* logsumexp, const float* delta,
                  int64_t n, float c, float* p, float* ds);
void softmax_grad(const float* s, Bias mask, const float* dp, const float* logsumexp, const float* delta,
                  int64_t n, float c, c10::BFloat16* p, c10::BFloat16* ds);

// dp = (dp - delta) * slope
void through_softcap(float* dp, const float* delta, const float* slope, int64_t n);

}  // namespace two_level_mha
