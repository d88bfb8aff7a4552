// Scratch memory of the CPU kernels, and rows of tensors as they read them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <type_traits>

#include "../../base/host_device.h"

namespace two_level_mha {

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

// Asks for n elements that are read later, from where no memory needs to be.
template <class T>
TLM_HOST_DEVICE void expect(const T* x, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < n * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
}

// Rows of one head of a 4-D tensor.
template <class T>
Rows<T> head_rows(const at::Tensor& x, int64_t batch, int64_t head) {
  const int64_t first = batch * x.stride(0) + head * x.stride(1);
  if constexpr (std::is_const_v<T>)  // a copy on write must not happen in a parallel loop
    return {x.const_data_ptr<std::remove_const_t<T>>() + first, x.stride(2)};
  else
    return {x.mutable_data_ptr<T>() + first, x.stride(2)};
}

}  // namespace two_level_mha
