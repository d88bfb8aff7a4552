// Passes over one row of a block of scores. A row of the forward runs over keys; a row of the backward
// belongs to one key and runs over queries, so that logsumexp and delta lie along it.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

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

// x is kept where the dropout mask of one row and columns column .. column + n keeps it, else 0.
void drop_columns(float* x, int64_t n, uint32_t low, uint32_t high, uint32_t column, uint32_t threshold);
void drop_columns(c10::BFloat16* x, int64_t n, uint32_t low, uint32_t high, uint32_t column,
                  uint32_t threshold);

// The bits of the mask of one column and n rows: all ones where kept.
void keep_bits(const uint32_t* low, const uint32_t* high, int64_t n, uint32_t column, uint32_t threshold,
               uint32_t* bits);
void drop_rows(float* x, int64_t n, const uint32_t* bits, float factor = 1.f);
void drop_rows(c10::BFloat16* x, int64_t n, const uint32_t* bits);

void scale_row(const float* x, int64_t n, float factor, float* out);
void scale_row(const float* x, int64_t n, float factor, c10::BFloat16* out);
void scale_row(const float* x, int64_t n, float factor, c10::Half* out);

// out += factor * x
void add_row(const float* x, int64_t n, float factor, float* out);

// out[i] = dot(x[i], y) and out += sum of factors[i] * x[i], over n rows of x, ld apart.
void dot_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out);
void add_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out);

float dot(const float* a, const float* b, int64_t n);
float dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n);
float dot(const c10::Half* a, const c10::Half* b, int64_t n);

}  // namespace two_level_mha
