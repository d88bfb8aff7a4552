#include "brgemm.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/hash.h>

#include <mutex>
#include <tuple>
#include <unordered_set>

#include "code_memory.h"

namespace two_level_mha {

using c10::BFloat16;

namespace {

// What torch finds a kernel by.
struct Shape {
  int64_t M, N, K, ld_a, ld_b, ld_c;
  bool add, pairs;
  auto all() const { return std::tie(M, N, K, ld_a, ld_b, ld_c, add, pairs); }
  bool operator==(const Shape& other) const { return all() == other.all(); }
};

struct Hash {
  size_t operator()(const Shape& s) const { return c10::hash<decltype(s.all())>()(s.all()); }
};

template <class T>
void multiply(const Shape& s, const T* A, const T* B, float* C) {
  at::native::cpublas::brgemm(s.M, s.N, s.K, s.ld_a, s.ld_b, s.ld_c, s.add, A, B, C, s.pairs);
}

template <class T>
void guarded(const Shape& shape, const T* A, const T* B, float* C) {
  // Of each thread and never emptied, as torch's own cache of kernels.
  static thread_local std::unordered_set<Shape, Hash> made;
  if (made.count(shape)) return multiply(shape, A, B, C);
  const std::unique_lock alone(kernel_memory());
  TORCH_CHECK(has_code_memory(), "the process may no longer write machine code");
  multiply(shape, A, B, C);
  made.insert(shape);
}

}  // namespace

void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
            const float* A, const float* B, float* C) {
  guarded({M, N, K, ld_a, ld_b, ld_c, add, /*pairs=*/false}, A, B, C);
}

void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
            const BFloat16* A, const BFloat16* B, float* C) {
  guarded({M, N, K, ld_a, ld_b, ld_c, add, /*pairs=*/true}, A, B, C);
}

std::shared_mutex& kernel_memory() {
  static std::shared_mutex mutex;
  return mutex;
}

}  // namespace two_level_mha
