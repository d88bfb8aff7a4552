// ATen's flash, cuDNN and memory-efficient kernels behind one contract: logsumexp (B, H, L) float32, natural
// log, -inf for a row that sees no key (each of them has its own shape and its own value there).
#include "aten_cuda.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>

#include <algorithm>
#include <limits>

#include "corner.h"

namespace two_level_mha {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

bool is_half(const Tensor& x) {
  return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
}

int capability(const Tensor& x) {
  auto* properties = at::cuda::getDeviceProperties(x.get_device());
  return 10 * properties->major + properties->minor;
}

// The call as all three kernels take it (corner.h; flash: always, efficient: mask type 2).
struct Call : Corner {
  const AttentionParams& params;
  Tensor q, k, v;
  int64_t B, H, K, L, S;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const AttentionParams& p)
      : Corner(p, q_.size(2), k_.size(2)),
        params(p),
        q(q_),
        k(k_.narrow(2, first_key, keys)),
        v(v_.narrow(2, first_key, keys)),
        B(q_.size(0)),
        H(q_.size(1)),
        K(k_.size(1)),
        L(q_.size(2)),
        S(k_.size(2)) {}
  int64_t d_qk() const { return q.size(3); }
  int64_t d_v() const { return v.size(3); }
};

// 16-byte aligned base and strides, as all three kernels want them.
Tensor aligned(const Tensor& x) {
  bool fits = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(3) == 1;
  for (int64_t dim = 0; dim < 3; dim++) fits = fits && x.stride(dim) * x.element_size() % 16 == 0;
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);
}

Tensor widen(const Tensor& x, int64_t d) {
  return aligned(x.size(3) == d ? x : at::constant_pad_nd(x, {0, d - x.size(3)}));
}

// (B, H, L, D) cut to `d`, in memory (B, L, H, D).
Tensor as_rows(const Tensor& x, int64_t d) {
  return x.narrow(3, 0, d).transpose(1, 2).contiguous().transpose(1, 2);
}

Backward as_gradients(const Call& call, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const int64_t after = call.S - call.first_key - call.keys;
  auto of_keys = [&](const Tensor& x, int64_t d) {
    return as_rows(call.keys == call.S ? x : at::constant_pad_nd(x, {0, 0, call.first_key, after}), d);
  };
  return {as_rows(dq, call.d_qk()), of_keys(dk, call.d_qk()), of_keys(dv, call.d_v()), Tensor()};
}

// --- flash and cuDNN: d_v = d_qk, so the narrower is padded with zeros, which change no score and no kept
// column.

int64_t common_width(const Call& call) {
  return round_up(std::max(call.d_qk(), call.d_v()), 8);
}

Forward flash_forward(const Call& call) {
  int64_t d = common_width(call);
  auto result = at::_scaled_dot_product_flash_attention(widen(call.q, d), widen(call.k, d), widen(call.v, d),
                                                        0.0, call.causal, false, call.params.scale);
  return {as_rows(std::get<0>(result), call.d_v()), std::get<1>(result)};
}

Forward cudnn_forward(const Call& call) {
  int64_t d = common_width(call);
  auto result =
      at::_scaled_dot_product_cudnn_attention(widen(call.q, d), widen(call.k, d), widen(call.v, d),
                                              std::nullopt, true, 0.0, call.causal, false, call.params.scale);
  return {as_rows(std::get<0>(result), call.d_v()),
          std::get<1>(result).reshape({call.B, call.H, call.L}).contiguous()};
}

// cuDNN's forward has this backward too: the contract is the same, and the shape in which cuDNN's own wants
// its statistics back differs between versions of torch.
Backward flash_backward(const Call& call, const Tensor& grad_out, const Tensor& out,
                        const Tensor& logsumexp) {
  int64_t d = common_width(call);
  Tensor random = at::empty({2}, call.q.options().dtype(at::kLong));  // not read without dropout
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(
      widen(grad_out, d), widen(call.q, d), widen(call.k, d), widen(call.v, d), widen(out, d),
      logsumexp.contiguous(), Tensor(), Tensor(), call.L, call.keys, 0.0, call.causal, random, random,
      call.params.scale);
  return as_gradients(call, dq, dk, dv);
}

// --- memory-efficient: any width, a mask, float32. Wants one KV head per query head: without a mask the
// heads of a group become rows of one head; with one, keys and values are repeated.

int64_t alignment(const Call& call) {
  return 16 / call.q.element_size();
}

bool folds(const Call& call) {
  return call.H != call.K && !call.causal && !call.params.mask.defined();
}

// (B, H, L, D) -> (B, rows, heads, D), contiguous in D.
Tensor query_rows(const Call& call, const Tensor& x, int64_t d) {
  Tensor wide = widen(x, d);
  if (folds(call)) wide = wide.reshape({call.B, call.K, call.H / call.K * call.L, d});
  return wide.transpose(1, 2);
}

Tensor key_rows(const Call& call, const Tensor& x, int64_t d) {
  Tensor wide = widen(x, d);
  if (call.H != call.K && !folds(call)) wide = wide.repeat_interleave(call.H / call.K, 1);
  return wide.transpose(1, 2);
}

// The mask as a bias in q's dtype, (b, h, l, keys): what broadcasts takes no memory, rows are 16-byte
// aligned. Undefined without a mask.
Tensor bias_of(const Call& call) {
  const Tensor& whole = call.params.mask;
  if (!whole.defined()) return Tensor();
  Tensor mask =
      whole.size(3) == 1 ? whole.expand({-1, -1, -1, call.keys}) : whole.narrow(3, call.first_key, call.keys);
  auto sizes = mask.sizes().vec();
  sizes[3] = round_up(call.keys, 16);
  Tensor bias = at::zeros(sizes, call.q.options()).narrow(3, 0, call.keys);
  if (mask.scalar_type() == at::kBool) return bias.masked_fill_(mask.logical_not(), -kInfinity);
  return bias.copy_(mask);
}

std::optional<Tensor> for_kernel(const Call& call, const Tensor& bias) {
  if (!bias.defined()) return std::nullopt;
  return bias.expand({call.B, call.H, call.L, call.keys});
}

// (B, H, L), true for rows whose scores are all -inf to the kernel, since its logsumexp does not tell. It
// multiplies scores by log2(e) in float32, where the lowest numbers of float32 and bfloat16 overflow.
Tensor empty_rows_of(const Call& call, const Tensor& bias) {
  const bool overflows = call.q.scalar_type() != at::kHalf;
  Tensor visible = bias.le(overflows ? std::numeric_limits<float>::lowest() / 1.5 : -kInfinity).logical_not();
  Tensor any = visible.any(-1);
  if (call.causal) {
    Tensor first = visible.to(at::kByte).argmax(-1);
    any = any.logical_and(first <= at::arange(call.L, first.options()) + *call.params.causal);
  }
  return any.logical_not().expand({call.B, call.H, call.L});
}

int64_t mask_type(const Call& call) {
  return call.causal ? 2 : 0;
}  // 2: causal from the bottom-right corner

Forward efficient_forward(const Call& call) {
  int64_t d_qk = round_up(call.d_qk(), alignment(call)), d_v = round_up(call.d_v(), alignment(call));
  Tensor q = query_rows(call, call.q, d_qk), bias = bias_of(call);
  auto result = at::_efficient_attention_forward(
      q, key_rows(call, call.k, d_qk), key_rows(call, call.v, d_v), for_kernel(call, bias), std::nullopt,
      std::nullopt, std::nullopt, std::nullopt, 0.0, mask_type(call), true, call.params.scale);
  Tensor out = std::get<0>(result).transpose(1, 2).reshape({call.B, call.H, call.L, d_v});
  Tensor logsumexp =
      std::get<1>(result).narrow(2, 0, q.size(1)).reshape({call.B, call.H, call.L}).contiguous();
  out = as_rows(out, call.d_v());
  if (bias.defined()) {
    Tensor empty = empty_rows_of(call, bias);
    out.masked_fill_(empty.unsqueeze(-1), 0);
    logsumexp.masked_fill_(empty, -kInfinity);
  }
  return {out, logsumexp};
}

// The kernel takes delta = sum(out * grad_out) over the columns by itself, where a gradient g of the
// logsumexp asks for delta - g. Two more columns do that: grad_out c, out -g / c (rounded, and what rounding
// lost), v 0. c keeps a g that a GradScaler made large in float16's range.
constexpr double kLift = 256;

Backward efficient_backward(const Call& call, const Tensor& grad_out, const Tensor& grad_logsumexp,
                            const Tensor& out, const Tensor& logsumexp) {
  bool more = grad_logsumexp.defined();
  int64_t d_qk = round_up(call.d_qk(), alignment(call)),
          d_v = round_up(call.d_v() + 2 * more, alignment(call));
  Tensor grad_wide = widen(grad_out, d_v), out_wide = widen(out, d_v);
  if (more) {
    Tensor g = at::where(at::isneginf(logsumexp), 0.0, grad_logsumexp.to(at::kFloat)).div(-kLift);
    Tensor rounded = g.to(call.q.scalar_type());
    grad_wide.narrow(3, call.d_v(), 2).fill_(kLift);
    out_wide.select(3, call.d_v()).copy_(rounded);
    out_wide.select(3, call.d_v() + 1).copy_(g - rounded);
  }
  Tensor q = query_rows(call, call.q, d_qk), k = key_rows(call, call.k, d_qk),
         v = key_rows(call, call.v, d_v);
  int64_t rows = q.size(1), heads = q.size(2);
  Tensor lse = at::full({call.B, heads, round_up(rows, 32)}, kInfinity, logsumexp.options());
  lse.narrow(2, 0, rows)
      .copy_(at::where(at::isneginf(logsumexp), kInfinity, logsumexp).reshape({call.B, heads, rows}));
  Tensor random = at::empty({}, call.q.options().dtype(at::kLong));  // not read without dropout
  auto result = at::_efficient_attention_backward(
      query_rows(call, grad_wide, d_v).contiguous(), q, k, v, for_kernel(call, bias_of(call)),
      query_rows(call, out_wide, d_v).contiguous(), std::nullopt, std::nullopt, rows, call.keys, lse, 0.0,
      random, random, mask_type(call), false, call.params.scale);
  Tensor dq = std::get<0>(result).transpose(1, 2).reshape({call.B, call.H, call.L, d_qk});
  auto of_heads = [&](const Tensor& x) {
    Tensor heads_first = x.transpose(1, 2);
    return heads == call.K ? heads_first : heads_first.unflatten(1, {call.K, heads / call.K}).sum(2);
  };
  return as_gradients(call, dq, of_heads(std::get<1>(result)), of_heads(std::get<2>(result)));
}

Backward efficient_backward_of_out(const Call& call, const Tensor& grad_out, const Tensor& out,
                                   const Tensor& logsumexp) {
  return efficient_backward(call, grad_out, Tensor(), out, logsumexp);
}

// --- the table: the first row that supports a call and is not switched off in torch.backends.cuda serves it.

// cuDNN 9.15.0 and older read beyond lengths that 128 does not divide (pytorch #169849).
constexpr int64_t kSafeCudnn = 91501;

bool cudnn_supports(const Call& call) {
  int arch = capability(call.q) / 10;
  return is_half(call.q) && (arch == 9 || arch == 10) && common_width(call) <= 128 &&
         at::Context::versionRuntimeCuDNN() >= kSafeCudnn && !call.params.mask.defined() && call.L > 1 &&
         call.keys > 1 && (!call.causal || call.L == call.keys);
}

bool flash_supports(const Call& call) {
  const int arch = capability(call.q);
  const int64_t d = common_width(call);
  // where shared memory is small the backward of these widths has no kernel
  const bool small = arch == 86 || arch == 89 || arch >= 120, fits = d <= 192 || (d > 224 && d <= 256);
  return is_half(call.q) && arch >= 80 && (small ? fits : d <= 256) && !call.params.mask.defined();
}

bool efficient_supports(const Call& call) {
  const Tensor& mask = call.params.mask;
  bool dtype = call.q.scalar_type() == at::kFloat || call.q.scalar_type() == at::kHalf ||
               (call.q.scalar_type() == at::kBFloat16 && capability(call.q) >= 80);
  // torch 2.11 indexes a bias by 32 bits
  const bool large = mask.defined() && mask.size(2) > 1 &&
                     call.L * round_up(call.keys, 16) > std::numeric_limits<int32_t>::max();
  return dtype && !large;
}

struct AtenKernel {
  const char* name;
  bool (at::Context::*enabled)() const;
  bool (*supports)(const Call&);
  Forward (*forward)(const Call&);
  Backward (*backward)(const Call&, const Tensor& grad_out, const Tensor& out, const Tensor& logsumexp);
};

constexpr AtenKernel kAtenKernels[] = {
    {"cudnn", &at::Context::userEnabledCuDNNSDP, cudnn_supports, cudnn_forward, flash_backward},
    {"flash", &at::Context::userEnabledFlashSDP, flash_supports, flash_forward, flash_backward},
    {"efficient", &at::Context::userEnabledMemEfficientSDP, efficient_supports, efficient_forward,
     efficient_backward_of_out},
};

const AtenKernel* choose(const Call& call) {
  for (const AtenKernel& kernel : kAtenKernels)
    if ((at::globalContext().*kernel.enabled)() && kernel.supports(call)) return &kernel;
  return nullptr;
}

// (B, H, L, D) in memory (B, L, H, D)
Tensor cat_rows(const Tensor& a, const Tensor& b) {
  return at::cat({a.transpose(1, 2), b.transpose(1, 2)}, 1).transpose(1, 2);
}

}  // namespace

bool aten_cuda_supports(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  if (!q.is_cuda() || q.numel() == 0 || v.numel() == 0 || q.size(0) > 65535) return false;
  if (params.dropout_p > 0 || params.softcap > 0) return false;
  const Cut cut(params, q.size(2), k.size(2));
  if (cut.after > 0)
    return aten_cuda_supports(cut.above(q), k, v, cut.top) &&
           aten_cuda_supports(cut.below(q), k, v, cut.bottom);
  Call call(q, k, v, params);
  return call.fits && choose(call) != nullptr;
}

Forward aten_cuda_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionParams& params) {
  const Cut cut(params, q.size(2), k.size(2));
  if (cut.after > 0) {
    auto [out, logsumexp] = aten_cuda_forward(cut.above(q), k, v, cut.top);
    auto [out_below, logsumexp_below] = aten_cuda_forward(cut.below(q), k, v, cut.bottom);
    return {cat_rows(out, out_below), at::cat({logsumexp, logsumexp_below}, 2)};
  }
  Call call(q, k, v, params);
  return choose(call)->forward(call);
}

Backward aten_cuda_backward(const Tensor& grad_out, const Tensor& grad_logsumexp, const Tensor& q,
                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                            const AttentionParams& params) {
  const Cut cut(params, q.size(2), k.size(2));
  if (cut.after > 0) {
    auto [dq, dk, dv, _] = aten_cuda_backward(cut.above(grad_out), cut.above(grad_logsumexp), cut.above(q), k,
                                              v, cut.above(out), cut.above(logsumexp), cut.top);
    auto [dq_below, dk_below, dv_below, _below] =
        aten_cuda_backward(cut.below(grad_out), cut.below(grad_logsumexp), cut.below(q), k, v, cut.below(out),
                           cut.below(logsumexp), cut.bottom);
    return {cat_rows(dq, dq_below), dk + dk_below, dv + dv_below, Tensor()};
  }
  Call call(q, k, v, params);
  if (grad_logsumexp.defined()) return efficient_backward(call, grad_out, grad_logsumexp, out, logsumexp);
  return choose(call)->backward(call, grad_out, out, logsumexp);
}

}  // namespace two_level_mha
