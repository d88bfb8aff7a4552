// The dropout mask (../dropout.h) on rows of weights: a row of the forward runs over columns of the mask, a
// row of the backward over its rows.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace two_level_mha {

// x is kept where the dropout mask of one row and columns column .. column + n keeps it, else 0.
void drop_columns(float* x, int64_t n, uint32_t low, uint32_t high, uint32_t column, uint32_t threshold);
void drop_columns(c10::BFloat16* x, int64_t n, uint32_t low, uint32_t high, uint32_t column,
                  uint32_t threshold);

// The bits of the mask of one column and n rows: all ones where kept.
void keep_bits(const uint32_t* low, const uint32_t* high, int64_t n, uint32_t column, uint32_t threshold,
               uint32_t* bits);
void drop_rows(float* x, int64_t n, const uint32_t* bits, float factor = 1.f);
void drop_rows(c10::BFloat16* x, int64_t n, const uint32_t* bits);

}  // namespace two_level_mha
