// What the blocked CPU attention multiplies with: scratch memory, packing, gemm and the task loop.
//
// A gemm reads A as rows and B as panels of 64 columns, each panel K x 64 and contiguous; bfloat16 panels
// interleave pairs of rows, which is what the dot-product instructions read. Blocks are padded with zeros to
// a multiple of kPad rows, and rows of bfloat16 to an even width, so that no product has a tail of its own.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../base/arithmetic.h"

// One body compiled for each instruction set; the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TLM_CLONES
#endif

namespace two_level_mha {

constexpr int64_t kPanel = 64;
constexpr int64_t kPad = 32;

inline int64_t padded(int64_t rows) {
  return ceil_div(rows, kPad) * kPad;
}

// Width of a packed row of `width` elements.
template <class C>
int64_t packed_width(int64_t width) {
  return std::is_same_v<C, c10::BFloat16> ? (width + 1) / 2 * 2 : width;
}

// Uninitialised, aligned memory.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0)
      : memory_(c10::GetCPUAllocator()->allocate(size * sizeof(T))), data_(static_cast<T*>(memory_.get())) {}
  T* data() { return data_; }
  operator T*() { return data_; }

 private:
  c10::DataPtr memory_;
  T* data_;
};

// Rows of a tensor: the element type, where the first is and how far apart they are.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  Rows from(int64_t row) const { return {data + row * stride, stride}; }
  T* operator[](int64_t row) const { return data + row * stride; }
};

// n rows of T as C, contiguous, padded with zeros to n_padded rows of packed_width.
template <class T, class C>
void copy_rows(Rows<const T> x, int64_t n, int64_t n_padded, int64_t width, C* out);

// x (n, width) contiguous, width already packed: panels of B = x^T, whose columns n .. n_padded are 0.
void pack_transposed(const float* x, int64_t n, int64_t n_padded, int64_t width, float* out);
void pack_transposed(const c10::BFloat16* x, int64_t n, int64_t n_padded, int64_t width, c10::BFloat16* out);

// x (n, width): panels of B = x, n even for bfloat16.
void pack(const float* x, int64_t n, int64_t width, float* out);
void pack(const c10::BFloat16* x, int64_t n, int64_t width, c10::BFloat16* out);

// x (n, width) contiguous to out (width, n).
void transpose(const float* x, int64_t n, int64_t width, float* out);
void transpose(const c10::BFloat16* x, int64_t n, int64_t width, c10::BFloat16* out);

// Whether brgemm multiplies float, and interleaved bfloat16, on this CPU. Found by trying:
// cpublas::could_pack asks for AMX, which brgemm does not need.
bool multiplies_float();
bool multiplies_bfloat16();

// C (M, N) (+)= A (M, K) B with B in panels. C has N columns.
template <class C>
void gemm(int64_t M, int64_t N, int64_t K, const C* A, const C* B, float* out, bool add) {
  for (int64_t column = 0; column < N; column += kPanel) {
    const int64_t width = std::min(kPanel, N - column);
    at::native::cpublas::brgemm(M, width, K, K, width, N, add, A, B + column * K, out + column,
                                std::is_same_v<C, c10::BFloat16>);
  }
}

// The same with B as plain rows of float, ld_b apart, and rows of A ld_a apart.
inline void gemm_rows(int64_t M, int64_t N, int64_t K, const float* A, int64_t ld_a, const float* B,
                      int64_t ld_b, float* out, bool add) {
  for (int64_t column = 0; column < N; column += kPanel)
    at::native::cpublas::brgemm(M, std::min(kPanel, N - column), K, ld_a, ld_b, N, add, A, B + column,
                                out + column, false);
}

// Calls work(scratch, task) for every task, in order, each by the next free thread; every thread makes one
// Scratch.
template <class Scratch, class Make, class Work>
void for_each_task(int64_t tasks, const Make& make, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    int64_t task = next++;
    if (task >= tasks) return;
    Scratch scratch = make();
    for (; task < tasks; task = next++) work(scratch, task);
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace two_level_mha
