// Sums, products and scalings of rows of numbers.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace two_level_mha {

void scale_row(const float* x, int64_t n, float factor, float* out);
void scale_row(const float* x, int64_t n, float factor, c10::BFloat16* out);
void scale_row(const float* x, int64_t n, float factor, c10::Half* out);

// out += factor * x
void add_row(const float* x, int64_t n, float factor, float* out);

// out[i] = dot(x[i], y) and out += sum of factors[i] * x[i], over n rows of x, ld apart.
void dot_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out);
void dot_rows(const c10::BFloat16* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out);
void dot_rows(const c10::Half* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out);
void add_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out);
void add_rows(const c10::BFloat16* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out);
void add_rows(const c10::Half* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out);

float dot(const float* a, const float* b, int64_t n);
float dot(const c10::BFloat16* a, const c10::BFloat16* b, int64_t n);
float dot(const c10::Half* a, const c10::Half* b, int64_t n);

}  // namespace two_level_mha
