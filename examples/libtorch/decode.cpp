// Greedy decoding of a tiny language model without Python: a prompt, then one token after the other, with the
// library's KV cache. The weights are drawn from one seed, layer after layer, so that a Python program that
// draws them alike must find the same tokens.
//
// Letters: B batch, L length, D embed dim, h heads, k KV heads, d head dim, V tokens of the vocabulary.
#include <torch/torch.h>
#include <two_level_mha/ops.h>

#include <cstdio>
#include <vector>

namespace tlm = two_level_mha;
using torch::Tensor;

namespace {

constexpr int64_t B = 1, D = 24, h = 4, k = 2, d = 8, V = 50, kLayers = 2, kNewTokens = 24;
constexpr double kTheta = 10000.0;

struct Layer {
  tlm::QkvWeights qkv;
  tlm::OutWeights out;
  tlm::CacheLayer cache;
};

Tensor draw(at::IntArrayRef sizes) {
  return torch::randn(sizes, torch::kFloat64);
}

Layer draw_layer() {
  Layer layer;
  layer.qkv.q = draw({h, d, D});
  layer.qkv.k = draw({k, d, D});
  layer.qkv.v = draw({k, d, D});
  layer.out.weight = draw({D, h, d});
  layer.cache.numbers = tlm::CacheNumbers{.by_position = 1};
  return layer;
}

// cos and sin (1, 1, L, d) of the positions from `first` on: pairs are dims c and c + d / 2.
std::vector<Tensor> angles(int64_t first, int64_t length) {
  const auto options = torch::TensorOptions(torch::kFloat32);
  Tensor frequency = 1.0 / torch::pow(kTheta, torch::arange(0, d, 2, options) / double(d));
  Tensor angle = torch::arange(first, first + length, options).unsqueeze(1) * frequency;
  angle = torch::cat({angle, angle}, -1).view({1, 1, length, d});
  return {angle.cos(), angle.sin()};
}

// One layer's attention of the new tokens x (B, L, D) over all so far.
Tensor attend(Layer& layer, const Tensor& x) {
  const int64_t length = x.size(1), position = layer.cache.numbers.length.expect_int();
  tlm::Constants constants;
  constants.num_heads = h;
  constants.num_kv_heads = k;
  constants.head_dim = d;
  constants.embed_dim = D;
  constants.scheme = int64_t(tlm::Scheme::position);
  constants.causal = 1;
  constants.element_size = x.element_size();
  const tlm::Context context = tlm::context_of(constants, {"", "", ""}, {B, length, length, position});

  tlm::Entered entered = tlm::enter(x, x, x, layer.qkv, {}, angles(position, length), {}, context);
  Tensor q = tlm::rotary(entered.q, entered.q_rows[0], entered.q_rows[1], /*interleaved=*/false);
  Tensor keys = tlm::rotary(entered.k, entered.k_rows[0], entered.k_rows[1], false);
  tlm::Attend causal;
  causal.causal = position;
  return tlm::leave(q, keys, entered.v, causal, layer.out, {}, context, &layer.cache);
}

}  // namespace

int main() {
  torch::NoGradGuard no_grad;
  torch::manual_seed(0);
  const Tensor embedding = draw({V, D});
  std::vector<Layer> layers;
  for (int64_t i = 0; i < kLayers; i++) layers.push_back(draw_layer());

  Tensor tokens =
      torch::tensor({3, 14, 15, 9, 26}, torch::kInt64).unsqueeze(0);  // (B, L): the prompt, then one
  for (int64_t step = 0; step < kNewTokens; step++) {
    Tensor x = embedding.index_select(0, tokens.view(-1)).view({B, -1, D});
    for (Layer& layer : layers) x = x + attend(layer, x / x.square().mean(-1, true).sqrt());
    tokens = x.select(1, -1).matmul(embedding.t()).argmax(-1, /*keepdim=*/true);
    std::printf("%lld ", static_cast<long long>(tokens.item<int64_t>()));
  }
  std::printf("\n");
}
