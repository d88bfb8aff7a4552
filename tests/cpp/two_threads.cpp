// Two threads call the operators at once, from their first call on: `make tsan`. Every thread must get the bits
// that one thread gets alone afterwards.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <two_level_mha/ops.h>

#include <cstdio>
#include <exception>
#include <latch>
#include <thread>
#include <vector>

namespace tlm = two_level_mha;
using at::Tensor;

namespace {

constexpr int64_t B = 2, L = 70, D = 24, h = 4, k = 2, d = 8;
constexpr int kCalls = 4;

using Tensors = std::vector<Tensor>;

struct Inputs {
  Tensor x, q_weight, k_weight, v_weight, out_weight, q, keys, v;

  static Tensor leaf(at::IntArrayRef sizes) { return at::randn(sizes).requires_grad_(); }

  Inputs()
      : x(leaf({B, L, D})),
        q_weight(leaf({h, d, D})),
        k_weight(leaf({k, d, D})),
        v_weight(leaf({k, d, D})),
        out_weight(leaf({D, h, d})),
        q(leaf({B, h, L, d})),
        keys(leaf({B, k, L, d})),
        v(leaf({B, k, L, d})) {}
};

void add_gradients(Tensors& found, const Tensor& y, const Tensors& inputs) {
  found.push_back(y.detach());
  for (const Tensor& grad : torch::autograd::grad({y}, inputs, {at::ones_like(y)})) found.push_back(grad);
}

// A layer: enter and leave.
void layer(Tensors& found, const Inputs& in) {
  tlm::Constants constants;
  constants.num_heads = h;
  constants.num_kv_heads = k;
  constants.head_dim = d;
  constants.embed_dim = D;
  constants.scheme = int64_t(tlm::Scheme::slices);
  constants.element_size = in.x.element_size();
  const tlm::Context context = tlm::context_of(constants, {"", "", ""}, {B, L, L, 0});
  tlm::QkvWeights weights;
  weights.q = in.q_weight, weights.k = in.k_weight, weights.v = in.v_weight;
  const tlm::Entered entered = tlm::enter(in.x, in.x, in.x, weights, {}, {}, {}, context);
  tlm::OutWeights out;
  out.weight = in.out_weight;
  tlm::Attend causal;
  causal.causal = 0;
  const Tensor y = tlm::leave(entered.q, entered.k, entered.v, causal, std::nullopt, out, {}, context);
  add_gradients(found, y, {in.x, in.q_weight, in.k_weight, in.v_weight, in.out_weight});
}

// Attention by every kernel of the CPU that differentiates, and one that does not.
void attention(Tensors& found, const Inputs& in) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    tlm::Attend options;
    options.causal = 3, options.softcap = 2.0, options.dropout_p = 0.3,
    options.seed = at::tensor({int64_t(3)});
    const auto [out, logsumexp] =
        tlm::partial_attention(in.q.to(dtype), in.keys.to(dtype), in.v.to(dtype), options);
    add_gradients(found, out, {in.q, in.keys, in.v});
  }
  const at::NoGradGuard no_grad;
  found.push_back(std::get<0>(tlm::partial_attention(in.q.narrow(2, 0, 3), in.keys, in.v, {})));
}

Tensors results(const Inputs& in) {
  Tensors found;
  for (int i = 0; i < kCalls; i++) layer(found, in), attention(found, in);
  return found;
}

}  // namespace

int main() {
  at::set_num_threads(1);  // libgomp's barriers are not the sanitizer's
  const Inputs in;
  std::vector<Tensors> found(2);
  std::vector<std::thread> threads;
  std::latch start(2);
  for (Tensors& own : found)
    threads.emplace_back([&] {
      at::set_num_threads(1);
      start.arrive_and_wait();
      try {
        own = results(in);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
      }
    });
  for (std::thread& thread : threads) thread.join();
  const Tensors expected = results(in);
  bool right = true;
  for (const Tensors& own : found) {
    right = right && own.size() == expected.size();
    for (size_t i = 0; right && i < expected.size(); i++) right = at::equal(own[i], expected[i]);
  }
  std::printf("two threads: %s\n", right ? "equal to one" : "WRONG");
  return right ? 0 : 1;
}
