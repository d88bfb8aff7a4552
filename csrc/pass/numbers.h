// Structs of integers that operators take as one list: a table of fields says their order.
#pragma once

#include <c10/core/SymInt.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <vector>

namespace two_level_mha {

template <class Numbers, class I>
struct Field {
  const char* name;
  I Numbers::*member;
};

// Raises ValueError unless there is a number for every field.
template <class Numbers, class I, size_t kCount>
Numbers parse(const char* name, const Field<Numbers, I> (&fields)[kCount], c10::ArrayRef<I> list) {
  TORCH_CHECK_VALUE(list.size() == kCount, name, " must be a list of ", kCount, " numbers, got ",
                    list.size());
  Numbers numbers;
  for (size_t i = 0; i < kCount; ++i) numbers.*fields[i].member = list[i];
  return numbers;
}

template <class Numbers, class I, size_t kCount>
std::vector<I> list_of(const Field<Numbers, I> (&fields)[kCount], const Numbers& numbers) {
  std::vector<I> list;
  for (const auto& field : fields) list.push_back(numbers.*field.member);
  return list;
}

// A number that a layer never changes.
inline int64_t constant(const c10::SymInt& x) {
  return x.guard_int(__FILE__, __LINE__);
}

}  // namespace two_level_mha
