// visible.h on tensors of scores, for the paths that compute them whole or in blocks through ATen.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace two_level_mha {

// Visible (visible.h) with sizes that may be symbolic.
struct SymVisible {
  std::optional<c10::SymInt> causal, window;
  c10::SymInt key_stride = 1;
};

// The last position that each of rows first .. first + rows sees: int64 (rows), on the device of `like`.
at::Tensor last_positions(const at::Tensor& like, const c10::SymInt& causal, const c10::SymInt& first,
                          const c10::SymInt& rows);

// scores (.., rows, keys) of rows from first_row and keys from
// first_key on, with -inf where a row does not see a key.
at::Tensor hide(const at::Tensor& scores, const SymVisible& visible, const c10::SymInt& first_row = 0,
                const c10::SymInt& first_key = 0);

}  // namespace two_level_mha
