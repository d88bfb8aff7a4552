// Whether oneDNN will find memory for one more kernel. Where it finds none, torch destroys the half-made kernel
// twice and the process ends: so whoever needs a new kernel asks here first.
#pragma once

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstddef>

namespace two_level_mha {

// A kernel is 256 KB of code, up to three times that while it grows, and objects on the heap, for which malloc
// may ask the system for 1 MB at a time.
constexpr size_t kCodeMemory = size_t(4) << 20;

// False where the system lets no process write machine code; an OutOfMemoryError where memory is short. Nothing
// touches the pages: it costs 2 us.
inline bool has_code_memory() {
  void* found = mmap(nullptr, kCodeMemory, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS,
                     /*fd=*/-1, /*offset=*/0);
  if (found != MAP_FAILED) return munmap(found, kCodeMemory) == 0;
  TORCH_CHECK_WITH(OutOfMemoryError, errno != ENOMEM && errno != EAGAIN,
                   "attention on the CPU: no memory for another kernel, which takes up to ",
                   kCodeMemory >> 20, " MB: free some, or raise the limit of the process (ulimit -v)");
  return false;
}

}  // namespace two_level_mha
