// From a call of the op to the kernel that serves it (kernels.h), and running that.
#pragma once

#include <string_view>

#include "contract.h"

namespace two_level_mha {

// ValueError with the names that there are if this is none of them; "" leaves the choice to the table.
void check_kernel_name(std::string_view name);

// Whether a kernel has a backward of its own; true for "".
bool has_backward(std::string_view kernel);

// Both run the kernel of that name, or, for "", the one that the table says. A name whose kernel cannot serve
// the call is a ValueError with what was asked, what is supported and what would serve it.
Forward attention_forward(std::string_view kernel, const Tensor& q, const Tensor& k, const Tensor& v,
                          const AttentionParams& params);

// grad_logsumexp may be undefined.
Backward attention_backward(std::string_view kernel, const Tensor& grad_out, const Tensor& grad_logsumexp,
                            const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const Tensor& logsumexp, const AttentionParams& params);

}  // namespace two_level_mha
