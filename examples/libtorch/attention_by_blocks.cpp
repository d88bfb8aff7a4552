// One attention layer on a (2, 2) grid in a single process without Python: every rank (i, j) in turn runs the
// ops that it would run on its own GPU, on its own weight blocks. The exchanges between ranks are plain
// concatenations here. The result and the gradients must equal those of the unsplit layer.
//
// Letters: B batch, L length, D embed dim, h heads, k KV heads, d head dim; H = h / n, K = k / n, E = d / m.
#include <torch/torch.h>
#include <two_level_mha/ops.h>

#include <cmath>
#include <cstdio>
#include <vector>

namespace tlm = two_level_mha;
using torch::Tensor;

namespace {

constexpr int64_t B = 2, L = 13, D = 24, h = 4, k = 2, d = 8;
constexpr double kTolerance = 1e-10;

struct Layer {
  Tensor q_weight, k_weight, v_weight, out_weight;  // (h, d, D), (k, d, D), (k, d, D), (D, h, d)

  std::vector<Tensor> parameters() const { return {q_weight, k_weight, v_weight, out_weight}; }
};

Tensor leaf(at::IntArrayRef sizes) {
  return torch::randn(sizes, torch::kFloat64).requires_grad_();
}

// Block (i, j) of a weight whose heads lie along `dim` and whose head dimension follows it.
Tensor block(const Tensor& weight, const tlm::Grid& grid, int64_t dim, int64_t i, int64_t j) {
  int64_t heads = weight.size(dim) / grid.head_groups;
  auto [first, count] = tlm::slice_columns(weight.size(dim + 1), grid.slices, j);
  return weight.narrow(dim, i * heads, heads).narrow(dim + 1, first, count);
}

// The layer in four lines of ATen, causal, query head x reading KV head x / (h / k).
Tensor unsplit(const Layer& layer, const Tensor& x) {
  auto project = [&](const Tensor& weight) { return torch::einsum("bld,hed->bhle", {x, weight}); };
  auto shared = [&](const Tensor& heads) { return heads.repeat_interleave(h / k, 1); };
  Tensor scores = project(layer.q_weight).matmul(shared(project(layer.k_weight)).mT()) / std::sqrt(double(d));
  Tensor hidden = torch::ones({L, L}, torch::kBool).triu(1);
  Tensor o = scores.masked_fill(hidden, -INFINITY).softmax(-1).matmul(shared(project(layer.v_weight)));
  return torch::einsum("bhle,dhe->bld", {o, layer.out_weight});
}

// The same by blocks, scheme `slices`: scores need whole heads, so q and k are gathered over the slice group;
// v, the output and the weights stay in slices.
Tensor by_blocks(const Layer& layer, const Tensor& x, const tlm::Grid& grid) {
  Tensor y = torch::zeros_like(x);
  for (int64_t i = 0; i < grid.head_groups; i++) {
    std::vector<Tensor> q, keys, v;
    for (int64_t j = 0; j < grid.slices; j++) {
      tlm::QkvWeights own{block(layer.q_weight, grid, 0, i, j), block(layer.k_weight, grid, 0, i, j),
                          block(layer.v_weight, grid, 0, i, j)};
      auto [q_BHLE, k_BKLE, v_BKLE] = tlm::qkv_projection(x, x, x, own, /*batch_first=*/true);
      q.push_back(q_BHLE), keys.push_back(k_BKLE), v.push_back(v_BKLE);
    }
    tlm::Attend causal;
    causal.causal = 0;
    Tensor q_BHLd = torch::cat(q, -1), k_BKLd = torch::cat(keys, -1);
    for (int64_t j = 0; j < grid.slices; j++) {
      auto [o_BHLE, logsumexp_BHL] = tlm::partial_attention(q_BHLd, k_BKLd, v[j], causal);
      y = y + tlm::out_projection(o_BHLE, block(layer.out_weight, grid, 1, i, j), std::nullopt);
    }
  }
  return y;
}

bool agree(const char* what, const Tensor& got, const Tensor& want) {
  double difference = (got - want).abs().max().item<double>();
  std::printf("%-22s largest difference %.1e\n", what, difference);
  return difference <= kTolerance;
}

}  // namespace

int main() {
  tlm::Grid grid{2, 2};
  if (std::string problem = grid.problem({h, k, d}); !problem.empty()) {
    std::fprintf(stderr, "%s\n", problem.c_str());
    return 2;
  }
  torch::manual_seed(0);
  Layer layer{leaf({h, d, D}), leaf({k, d, D}), leaf({k, d, D}), leaf({D, h, d})};
  Tensor x = leaf({B, L, D}), grad = torch::randn({B, L, D}, torch::kFloat64);

  auto inputs = layer.parameters();
  inputs.push_back(x);
  Tensor y = by_blocks(layer, x, grid), want = unsplit(layer, x);
  auto gradients = torch::autograd::grad({y}, inputs, {grad}),
       wanted = torch::autograd::grad({want}, inputs, {grad});

  const char* names[] = {"gradient of q_weight", "gradient of k_weight", "gradient of v_weight",
                         "gradient of out_weight", "gradient of x"};
  bool right = agree("output", y, want);
  for (size_t n = 0; n < inputs.size(); n++) right = agree(names[n], gradients[n], wanted[n]) && right;
  std::printf("grid %s: %s\n", grid.text().c_str(), right ? "equal to the unsplit layer" : "WRONG");
  return right ? 0 : 1;
}
