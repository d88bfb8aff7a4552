// oneDNN's brgemm, which makes a kernel of machine code for every new shape on every thread, with memory looked
// for before (code_memory.h).
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <shared_mutex>

namespace two_level_mha {

// C (M, N) (+)= A (M, K) B (K, N), rows ld apart; bfloat16 B in interleaved pairs of rows.
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
            const float* A, const float* B, float* C);
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C);

// Held alone while a kernel is made, shared while threads of a pass take their scratch memory: none takes what
// was just found for the kernel.
std::shared_mutex& kernel_memory();

}  // namespace two_level_mha
