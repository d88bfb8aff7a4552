#include "vectors.h"

#include <cstring>
#include <utility>

#include "../../base/host_device.h"
#include "buffer.h"
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

constexpr int64_t kAhead = 32;  // rows to ask for ahead: no hardware follows them beyond a page, or far apart

template <int kLanes>
struct Types;
template <>
struct Types<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
};
template <>
struct Types<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
};

// A register of floats, and two of them of elements. Halves lie two to a word: they come as those at even and
// those at odd places, without a move across lanes.
template <int kLanes>
struct Register {
  using Floats = typename Types<kLanes>::Floats;
  using Words = typename Types<kLanes>::Words;

  static TLM_HOST_DEVICE void load_two(const float* x, Floats& a, Floats& b) {
    std::memcpy(&a, x, sizeof(a));
    std::memcpy(&b, x + kLanes, sizeof(b));
  }

  template <class T>
  static TLM_HOST_DEVICE void load_two(const T* x, Floats& even, Floats& odd) {
    Words words;
    std::memcpy(&words, x, sizeof(words));
    widen(words << 16, T{}, even);
    widen(words & 0xffff0000u, T{}, odd);
  }

  // Words whose upper half is the number.
  static TLM_HOST_DEVICE void widen(const Words& word, BFloat16, Floats& out) {
    std::memcpy(&out, &word, sizeof(out));
  }

  // By integers and a product, or where the exponent is 0 a difference, that put the exponent right.
  static TLM_HOST_DEVICE void widen(const Words& word, Half, Floats& out) {
    const Words magnitude = word << 1, sign = word & 0x80000000u;
    Words bits = (magnitude >> 4) + (0xe0u << 23);
    std::memcpy(&out, &bits, sizeof(out));
    const Floats normal = out * 0x1p-112f;
    bits = (magnitude >> 17) | (126u << 23);
    std::memcpy(&out, &bits, sizeof(out));
    out = magnitude < (1u << 27) ? out - 0.5f : normal;
    std::memcpy(&bits, &out, sizeof(bits));
    bits |= sign;
    std::memcpy(&out, &bits, sizeof(out));
  }

  // Floats in the order of T's, and back.
  template <class T, int... kLane>
  static TLM_HOST_DEVICE void load_as(const float* x, Floats& a, Floats& b,
                                      std::integer_sequence<int, kLane...>) {
    load_two(x, a, b);
    if constexpr (sizeof(T) == 2) {
      const Floats first = a, second = b;
      a = __builtin_shufflevector(first, second, (2 * kLane)...);
      b = __builtin_shufflevector(first, second, (2 * kLane + 1)...);
    }
  }

  template <class T, int... kLane>
  static TLM_HOST_DEVICE void store_as(const Floats& a, const Floats& b, float* x,
                                       std::integer_sequence<int, kLane...>) {
    Floats first = a, second = b;
    if constexpr (sizeof(T) == 2) {
      first = __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kLane / 2)...);
      second = __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kLanes / 2 + kLane / 2)...);
    }
    std::memcpy(x, &first, sizeof(first));
    std::memcpy(x + kLanes, &second, sizeof(second));
  }

  template <int kDistance = kLanes / 2, int... kLane>
  static TLM_HOST_DEVICE float sum(Floats& x, std::integer_sequence<int, kLane...> lanes) {
    x += __builtin_shufflevector(x, x, (kLane ^ kDistance)...);
    if constexpr (kDistance > 1) return sum<kDistance / 2>(x, lanes);
    return x[0];
  }
};

template <int kLanes, int kRows, class T>
TLM_HOST_DEVICE void dots(const T* x, int64_t ld, int64_t width, const float* y, float* out) {
  using R = Register<kLanes>;
  constexpr std::make_integer_sequence<int, kLanes> kEach;
  typename R::Floats sums[kRows] = {}, a, b, y_a, y_b;
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    R::template load_as<T>(y + i, y_a, y_b, kEach);
    for (int64_t r = 0; r < kRows; ++r) {
      R::load_two(x + r * ld + i, a, b);
      expect(x + (r + kAhead) * ld + i, 2 * kLanes);
      sums[r] += a * y_a;
      sums[r] += b * y_b;
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    out[r] = R::sum(sums[r], kEach);
    for (int64_t j = i; j < width; ++j) out[r] += load(x + r * ld, j) * y[j];
  }
}

template <int kLanes, int kRows, class T>
TLM_HOST_DEVICE void add(const T* x, int64_t ld, int64_t width, const float* factors, float* out) {
  using R = Register<kLanes>;
  constexpr std::make_integer_sequence<int, kLanes> kEach;
  typename R::Floats a, b, out_a, out_b;
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    R::template load_as<T>(out + i, out_a, out_b, kEach);
    for (int64_t r = 0; r < kRows; ++r) {
      R::load_two(x + r * ld + i, a, b);
      expect(x + (r + kAhead) * ld + i, 2 * kLanes);
      out_a += factors[r] * a;
      out_b += factors[r] * b;
    }
    R::template store_as<T>(out_a, out_b, out + i, kEach);
  }
  for (; i < width; ++i)
    for (int64_t r = 0; r < kRows; ++r) out[i] += factors[r] * load(x + r * ld, i);
}

// Four rows at a time, which share a row of y.
template <class T>
void dot_rows_of(const T* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out) {
  vectorised_by_lanes([=](auto lanes) TLM_INLINE {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) dots<lanes, 4>(x + i * ld, ld, width, y, out + i);
    for (; i < n; ++i) dots<lanes, 1>(x + i * ld, ld, width, y, out + i);
  });
}

// Eight rows at a time, since each pass reads and writes `out`.
template <class T>
void add_rows_of(const T* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out) {
  vectorised_by_lanes([=](auto lanes) TLM_INLINE {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) add<lanes, 8>(x + i * ld, ld, width, factors + i, out);
    for (; i < n; ++i) add<lanes, 1>(x + i * ld, ld, width, factors + i, out);
  });
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
  float out;
  dot_rows_of(a, 0, 1, n, b, &out);
  return out;
}

void dot_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out) {
  dot_rows_of(x, ld, n, width, y, out);
}

void add_rows(const float* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out) {
  add_rows_of(x, ld, n, width, factors, out);
}

void dot_rows(const BFloat16* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out) {
  dot_rows_of(x, ld, n, width, y, out);
}

void add_rows(const BFloat16* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out) {
  add_rows_of(x, ld, n, width, factors, out);
}

void dot_rows(const Half* x, int64_t ld, int64_t n, int64_t width, const float* y, float* out) {
  dot_rows_of(x, ld, n, width, y, out);
}

void add_rows(const Half* x, int64_t ld, int64_t n, int64_t width, const float* factors, float* out) {
  add_rows_of(x, ld, n, width, factors, out);
}

float dot(const BFloat16* a, const BFloat16* b, int64_t n) {
  return dot_by_element(a, b, n);
}
float dot(const Half* a, const Half* b, int64_t n) {
  return dot_by_element(a, b, n);
}

}  // namespace two_level_mha
