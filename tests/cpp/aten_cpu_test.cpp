// What no CPU at hand chooses: the row of the dispatch table that needs AMX, which calls it takes and what it
// answers; and how the GPU's kernels take a causal call.
#include <ATen/ATen.h>

#include <cstdio>

#include "../../csrc/attend/aten_cpu.h"
#include "../../csrc/attend/chunked.h"
#include "../../csrc/attend/corner.h"

using namespace two_level_mha;

namespace {

int failures = 0;

void expect(bool right, const char* what) {
  if (right) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

struct Inputs {
  Tensor q, k, v;
};

Inputs make(int64_t H, int64_t K, int64_t L, int64_t S, int64_t d, int64_t d_v, at::ScalarType type) {
  auto random = [&](int64_t heads, int64_t n, int64_t width) {
    return at::randn({2, heads, n, width}, at::kDouble).to(type);
  };
  return {random(H, L, d), random(K, S, d), random(K, S, d_v)};
}

AttentionParams plain() {
  AttentionParams params;
  params.scale = 0.2;
  return params;
}

bool fits(const Inputs& x, const AttentionParams& params) {
  return aten_cpu_fits(x.q, x.k, x.v, params);
}

void check_what_it_takes() {
  const Inputs x = make(4, 2, 6, 9, 8, 8, at::kBFloat16);
  AttentionParams p = plain();
  expect(fits(x, p), "takes GQA");
  expect(fits(make(4, 2, 6, 9, 8, 8, at::kHalf), p), "takes fp16");
  expect(!fits(make(4, 2, 6, 9, 8, 8, at::kFloat), p), "leaves fp32");
  expect(!fits(make(4, 2, 6, 9, 8, 4, at::kBFloat16), p), "leaves d_v != d_qk");
  expect(!fits(make(4, 2, 6, 0, 8, 8, at::kBFloat16), p), "leaves S = 0");
  expect(!fits(make(4, 2, 0, 9, 8, 8, at::kBFloat16), p), "leaves L = 0");
  p.causal = 0;
  expect(fits(x, p), "takes causal from the top-left corner");
  p.key_stride = 2;
  expect(!fits(x, p), "leaves a key stride");
  p = plain(), p.causal = 3;
  expect(!fits(x, p), "leaves a causal offset");
  p.causal = -1;
  expect(!fits(x, p), "leaves rows before the first key");
  p.causal = 8;
  expect(fits(x, p), "takes an offset that hides nothing");
  p.window = 20;
  expect(!fits(x, p), "leaves a window");
  p = plain(), p.softcap = 2.0;
  expect(!fits(x, p), "leaves a soft cap");
  p = plain(), p.dropout_p = 0.1;
  expect(!fits(x, p), "leaves dropout");
  p = plain(), p.mask = at::ones({1, 1, 1, 9}, at::kBool);
  expect(!fits(x, p), "leaves a mask");
}

double error(const Tensor& x, const Tensor& y) {
  return ((x.to(at::kDouble) - y).norm() / y.norm()).item<double>();
}

void check_values(const AttentionParams& params, bool grad_logsumexp) {
  const Inputs x = make(4, 2, 70, 90, 16, 16, at::kBFloat16);
  const Inputs wide{x.q.to(at::kDouble), x.k.to(at::kDouble), x.v.to(at::kDouble)};
  const Tensor g = at::randn_like(x.q), g_lse = grad_logsumexp ? at::randn({2, 4, 70}) : Tensor();
  auto [out, lse] = aten_cpu_forward(x.q, x.k, x.v, params);
  auto [out_wide, lse_wide] = chunked_forward(wide.q, wide.k, wide.v, params);
  auto mine = aten_cpu_backward(g, g_lse, x.q, x.k, x.v, out, lse, params);
  auto true_ = chunked_backward(g.to(at::kDouble), grad_logsumexp ? g_lse.to(at::kDouble) : g_lse, wide.q,
                                wide.k, wide.v, out_wide, lse_wide, params, false);
  expect(lse.is_contiguous() && lse.scalar_type() == at::kFloat, "logsumexp is contiguous float32");
  expect(out.strides() == out_wide.strides(), "strides of out");
  expect(std::get<1>(mine).strides() == std::get<1>(true_).strides(), "strides of dk");
  expect(error(out, out_wide) < 1e-2 && error(lse, lse_wide) < 1e-5, "out, logsumexp");
  expect(error(std::get<0>(mine), std::get<0>(true_)) < 2e-2, "dq");
  expect(error(std::get<1>(mine), std::get<1>(true_)) < 2e-2, "dk");
  expect(error(std::get<2>(mine), std::get<2>(true_)) < 2e-2, "dv");
}

// Whether what a kernel would show each row is what each row sees.
bool agrees(const AttentionParams& p, int64_t L, int64_t S) {
  const Cut cut(p, L, S);
  if (cut.after > 0) {
    for (int64_t row = cut.before; row < L; ++row)
      if (p.keys_of(row, S).begin != 0 || p.keys_of(row, S).end != S) return false;
    return !Corner(p, L, S).fits && !cut.bottom.causal && Corner(cut.bottom, cut.after, S).fits &&
           Corner(cut.top, cut.before, S).fits && agrees(cut.top, cut.before, S);
  }
  const Corner corner(p, L, S);
  for (int64_t row = 0; corner.fits && row < L; ++row) {
    const Range seen = p.keys_of(row, S);
    const int64_t end = corner.first_key + corner.keys - (corner.causal ? L - 1 - row : 0);
    if (seen.begin != corner.first_key || seen.end != end) return false;
  }
  return true;
}

void check_corners() {
  for (int64_t L = 1; L <= 5; ++L)
    for (int64_t S = 1; S <= 6; ++S)
      for (int64_t causal = -3; causal <= 8; ++causal)
        for (int64_t window = 0; window <= 3; ++window)
          for (int64_t stride = 1; stride <= 3; ++stride) {
            AttentionParams p = plain();
            p.causal = causal, p.key_stride = stride;
            if (window > 0) p.window = window;
            expect(agrees(p, L, S), "keys of a causal call");
            const bool must = causal >= 0 && window == 0 && (stride == 1 || L == 1);
            expect(!must || Cut(p, L, S).after > 0 || Corner(p, L, S).fits,
                   "a causal call left to no kernel");
          }
}

void check_cut_values() {
  const Inputs x = make(4, 2, 7, 5, 8, 4, at::kDouble);
  AttentionParams p = plain();
  p.causal = 1;
  p.mask = at::randn({2, 1, 7, 5}, at::kDouble);
  const Cut cut(p, 7, 5);
  auto [out, lse] = chunked_forward(x.q, x.k, x.v, p);
  auto [top, lse_top] = chunked_forward(cut.above(x.q), x.k, x.v, cut.top);
  auto [bottom, lse_bottom] = chunked_forward(cut.below(x.q), x.k, x.v, cut.bottom);
  expect(cut.before == 3 && cut.after == 4, "where a call is cut");
  expect(at::allclose(out, at::cat({top, bottom}, 2)), "out of a cut call");
  expect(at::allclose(lse, at::cat({lse_top, lse_bottom}, 2)), "logsumexp of a cut call");
}

}  // namespace

int main() {
  check_what_it_takes();
  check_corners();
  check_cut_values();
  AttentionParams causal = plain(), all = plain();
  causal.causal = 0;
  all.causal = 89;
  for (bool grad_logsumexp : {false, true})
    for (const AttentionParams& params : {plain(), causal, all}) check_values(params, grad_logsumexp);
  if (failures == 0) std::printf("all right\n");
  return failures != 0;
}
