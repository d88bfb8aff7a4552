#include "registry.h"

#include <ATen/core/Formatting.h>

#include "aten/cpu.h"
#include "aten/cuda.h"
#include "chunked.h"
#include "cpu/blocked.h"
#include "cpu/decode.h"
#include "kernels.h"
#include "machine.h"

namespace two_level_mha {

namespace {

using RunForward = Forward (*)(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams&);
using RunBackward = Backward (*)(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                                 const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                                 const AttentionParams&);

// What the rows of kKernels run; null where a kernel has no backward.
struct Functions {
  std::string_view name;
  RunForward forward;
  RunBackward backward;
};

constexpr Functions kFunctions[] = {
    {"aten_cudnn", cudnn_forward, cudnn_backward},
    {"aten_flash", flash_forward, flash_backward},
    {"aten_efficient", efficient_forward, efficient_backward},
    {"cpu_decode", decode_forward, nullptr},
    {"aten_cpu", aten_cpu_forward, aten_cpu_backward},
    {"cpu_blocked", blocked_forward, blocked_backward},
    {"chunked", chunked_forward, chunked_backward},
};

constexpr bool same_rows() {
  if (std::size(kFunctions) != std::size(kKernels)) return false;
  for (size_t i = 0; i < std::size(kKernels); ++i)
    if (kFunctions[i].name != kKernels[i].name ||
        (kFunctions[i].backward != nullptr) != ((kKernels[i].features & kBackward) != 0))
      return false;
  return true;
}
static_assert(same_rows(), "kFunctions has the rows of kKernels, in their order");

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      return Dtype::float32;
  }
}

Request request_of(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  Request r;
  r.dtype = dtype_of(q);
  r.B = q.size(0), r.H = q.size(1), r.K = k.size(1), r.L = q.size(2), r.S = k.size(2);
  r.d_qk = q.size(3), r.d_v = v.size(3);
  r.visible = params;
  r.softcap = params.softcap > 0.0;
  r.dropout = params.dropout_p > 0.0;
  if (params.mask.defined()) {
    r.mask = params.mask.scalar_type() == at::kBool ? MaskKind::boolean : MaskKind::additive;
    r.mask_rows = params.mask.size(2) > 1;
  }
  return r;
}

std::string all_names() {
  std::string names;
  for (const Kernel& kernel : kKernels) names += (names.empty() ? "" : ", ") + std::string(kernel.name);
  return names;
}

// The row for a call: the one of that name, else the table's.
const Functions& choose(std::string_view name, const Request& request, const Tensor& q) {
  const Machine machine = machine_of(q);
  const Kernel* kernel = name.empty() ? &serving(request, machine) : find_kernel(name);
  if (!name.empty()) {
    const std::string reason = why_not(*kernel, request, machine);
    TORCH_CHECK_VALUE(reason.empty(), "kernel '", name, "' cannot serve this call: it ", reason,
                      ". The call needs ", feature_names(needs(request)), ", with q (", request.B, ", ",
                      request.H, ", ", request.L, ", ", request.d_qk, "), k (", request.B, ", ", request.K,
                      ", ", request.S, ", ", request.d_qk, ") and d_v = ", request.d_v,
                      "; kernel_name='' would take '", serving(request, machine).name,
                      "'. Kernels: ", all_names());
  }
  return kFunctions[kernel - kKernels];
}

}  // namespace

void check_kernel_name(std::string_view name) {
  TORCH_CHECK_VALUE(name.empty() || find_kernel(name), "kernel_name must be one of ", all_names(),
                    ", or '' for the fastest that serves the call, got '", name, "'");
}

bool has_backward(std::string_view kernel) {
  return kernel.empty() || find_kernel(kernel)->features & kBackward;
}

Forward attention_forward(std::string_view kernel, const Tensor& q, const Tensor& k, const Tensor& v,
                          const AttentionParams& params) {
  return choose(kernel, request_of(q, k, v, params), q).forward(q, k, v, params);
}

Backward attention_backward(std::string_view kernel, const Tensor& grad_out, const Tensor& grad_logsumexp,
                            const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                            const Tensor& logsumexp, const AttentionParams& params) {
  Request request = request_of(q, k, v, params);
  request.backward = true;
  request.grad_logsumexp = grad_logsumexp.defined();
  request.grad_mask = params.mask_grad;
  return choose(kernel, request, q).backward(grad_out, grad_logsumexp, q, k, v, out, logsumexp, params);
}

}  // namespace two_level_mha
