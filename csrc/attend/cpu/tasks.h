// How the CPU kernels share work among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <shared_mutex>

#include "brgemm.h"

namespace two_level_mha {

// Calls work(scratch, task) for every task, in order, each
// by the next free thread; every thread makes one Scratch.
template <class Scratch, class Make, class Work>
void for_each_task(int64_t tasks, const Make& make, const Work& work) {
  struct Release {
    ~Release() { at::native::cpublas::brgemm_release(); }
  };
  const auto take = [&] {
    const std::shared_lock beside(kernel_memory());
    return make();
  };
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    int64_t task = next++;
    if (task >= tasks) return;
    const Release at_end;  // of an exception too
    Scratch scratch = take();
    for (; task < tasks; task = next++) work(scratch, task);
  });
}

}  // namespace two_level_mha
