// torch's allocator of the CPU, of which one allocation can be made to fail: tests/ops/test_allocation_failures.py.
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>

namespace {

class FailingAllocator final : public c10::Allocator {
 public:
  explicit FailingAllocator(c10::Allocator* behind) : behind_(behind) {}

  c10::DataPtr allocate(size_t size) override {
    TORCH_CHECK_WITH(OutOfMemoryError, --until_failure_ != 0, "this allocation fails");
    return behind_->allocate(size);
  }
  c10::DeleterFnPtr raw_deleter() const override { return behind_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t size) const override {
    behind_->copy_data(to, from, size);
  }

  std::atomic<int64_t> until_failure_{0};

 private:
  c10::Allocator* behind_;
};

FailingAllocator* installed = nullptr;

}  // namespace

// Wraps the allocator in use, for as long as the process lives.
extern "C" void install() {
  installed = new FailingAllocator(c10::GetCPUAllocator());
  c10::SetCPUAllocator(installed, /*priority=*/255);
}

// The k-th allocation from now on fails, and no other; none for k = 0. Returns whether the last one asked to
// fail has not come.
extern "C" bool fail_at(int64_t k) {
  return installed->until_failure_.exchange(k) > 0;
}
