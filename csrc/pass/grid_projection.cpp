#include "grid_projection.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/split_with_sizes.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "../base/sizes.h"
#include "../comm/exchange.h"
#include "../comm/replicated.h"
#include "../comm/split.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Tensors = std::vector<Tensor>;

// What the autograd functions of one call share.
struct ProjectionState : torch::CustomClassHolder {
  Chunking chunks_;
  std::optional<Split> split;
  SumGroups groups;
  std::optional<at::ScalarType> reduce_dtype;
  bool batch_first;
  std::array<size_t, 3> at;            // the input of q, k and v
  std::array<size_t, 3> bias{};        // the number of its bias among weights and biases, or 0
  std::vector<c10::SymInt> sizes;      // of the wholes of split inputs, along the dim that is split
  std::vector<at::ScalarType> dtypes;  // of the inputs
  std::vector<bool> trained;
  Tensors inputs;  // for the weights' gradients; the autograd functions take them

  struct Chunk {
    Tensors parts;          // of the inputs, if split, until they are sent
    Later<Tensors> inputs;  // the wholes, on their way
    Tensors products;       // gradients of each input's products (.., heads * E), for the weights
    Later<Tensors> sums;    // of the gradients of the trained inputs, on their way
  };
  std::vector<Chunk> of_chunk;
  Later<Tensors> wholes;  // on their way for the weights, if split

  // Whether a sum had another stage.
  bool advance_sums() const {
    bool more = false;
    for (const Chunk& chunk : of_chunk) more |= chunk.sums.advance();
    return more;
  }

  int64_t batch_dim() const { return split || batch_first ? 0 : 1; }

  Tensors begin_inputs(const Tensors& xs) {
    std::vector<Tensors> chunks(chunks_.count);
    for (const Tensor& x : xs) {
      const Tensors pieces = in_chunks(x, batch_dim(), chunks_);
      for (size_t c = 0; c < pieces.size(); ++c) chunks[c].push_back(pieces[c]);
    }
    Tensors begun;
    for (size_t c = 0; c < chunks.size(); ++c) {
      for (const Tensor& x : chunks[c]) begun.push_back(split ? at::empty({0}, x.options()) : x);
      if (split) of_chunk[c].parts = std::move(chunks[c]);
    }
    if (split) begin_chunk(0);
    return begun;
  }

  void begin_chunk(int64_t c) {
    of_chunk[c].inputs = begin_all_parts(std::exchange(of_chunk[c].parts, {}), sizes, *split);
  }

  std::tuple<Tensor, Tensor, Tensor> project(int64_t c, Tensors xs, const Tensors& weights) {
    if (split) {
      xs = arrived(of_chunk[c].inputs);
      if (c + 1 < chunks_.count) begin_chunk(c + 1);  // not before: chunks that travel together all come last
      for (Tensor& x : xs) x = x.squeeze(1);
    }
    auto of = [&](size_t i) { return bias[i] == 0 ? std::nullopt : std::optional<Tensor>(weights[bias[i]]); };
    return qkv_projection(xs[at[0]], xs[at[1]], xs[at[2]],
                          {weights[0], weights[1], weights[2], of(0), of(1), of(2)}, split || batch_first);
  }

  Later<Tensors> begin_sums(Tensors grads) const {
    if (split) return begin_sum_parts(std::move(grads), *split, reduce_dtype, std::nullopt);
    Tensors flat;
    std::vector<c10::SymInt> lengths;
    std::vector<std::vector<c10::SymInt>> shapes;
    for (const Tensor& grad : grads) {
      flat.push_back(grad.reshape(-1));
      lengths.push_back(grad.sym_numel());
      shapes.push_back(grad.sym_sizes().vec());
    }
    auto sum = begin_sum_over(flat.size() > 1 ? at::cat(flat) : flat[0], groups, reduce_dtype, /*own=*/true);
    return then(sum, [=](const Tensor& all) {
      Tensors found = at::split_with_sizes_symint(all, lengths);
      for (size_t i = 0; i < found.size(); ++i) found[i] = found[i].view_symint(shapes[i]);
      return found;
    });
  }
};

namespace {

ProjectionState& shared_of(AutogradContext* ctx) {
  return *c10::static_intrusive_pointer_cast<ProjectionState>(ctx->saved_data["shared"].toCapsule());
}

// x as another tensor, which counts changes as x does.
Tensor same_as(const Tensor& x, const Tensor& view) {
  // below ADInplaceOrView a view counts its own changes: what saves it would not see those of x
  Tensor found = view.is_same(x) ? x.view_as(x) : view;
  torch::autograd::impl::set_version_counter(found, torch::autograd::impl::version_counter(x));
  return found;
}

// Forward: the inputs of every chunk, or what stands for those on their way. Backward: waits for their gradients.
struct Enter : torch::autograd::Function<Enter> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs,
                               const c10::intrusive_ptr<ProjectionState>& shared) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["shared"] = c10::IValue::make_capsule(shared);
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list begun = shared->begin_inputs(inputs.vec());
    if (!shared->split)
      for (size_t i = 0; i < begun.size(); ++i) begun[i] = same_as(inputs[i % inputs.size()], begun[i]);
    return begun;
  }
  static variable_list backward(AutogradContext* ctx, variable_list) {
    ProjectionState& shared = shared_of(ctx);
    while (shared.advance_sums()) continue;
    std::vector<Tensors> chunks;
    for (auto& chunk : shared.of_chunk)
      if (chunk.sums) chunks.push_back(arrived(chunk.sums));
    variable_list grads(shared.trained.size() + 1);
    if (chunks.empty()) return grads;
    size_t next = 0;
    for (size_t i = 0; i < shared.trained.size(); ++i) {
      if (!shared.trained[i]) continue;
      Tensors mine;
      for (const Tensors& chunk : chunks) mine.push_back(chunk[next]);
      grads[i] = from_chunks(mine, shared.batch_dim(), shared.chunks_);
      ++next;
    }
    return grads;
  }
};

// Forward: the weights and biases. Backward: their gradients, from what the chunks left.
struct Weights : torch::autograd::Function<Weights> {
  static variable_list forward(AutogradContext* ctx, at::TensorList weights,
                               const c10::intrusive_ptr<ProjectionState>& shared) {
    ctx->set_materialize_grads(false);
    Tensors kept = weights.vec();
    if (!shared->split) kept.insert(kept.end(), shared->inputs.begin(), shared->inputs.end());
    ctx->save_for_backward(kept);
    ctx->saved_data["shared"] = c10::IValue::make_capsule(shared);
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list out;
    for (const Tensor& weight : weights) out.push_back(same_as(weight, weight));
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list nothing) {
    ProjectionState& shared = shared_of(ctx);
    const variable_list kept = ctx->get_saved_variables();
    const size_t count = nothing.size(), inputs = shared.trained.size();
    variable_list grads(count + 1);
    if (shared.of_chunk[0].products.empty()) return grads;
    const Tensors xs = shared.split ? arrived(shared.wholes) : Tensors(kept.begin() + count, kept.end());
    for (size_t input = 0; input < inputs; ++input) {
      Tensors products;
      for (auto& chunk : shared.of_chunk) products.push_back(std::move(chunk.products[input]));
      const Tensor product = from_chunks(products, shared.batch_dim(), shared.chunks_).flatten(0, 1);
      const Tensor x = xs[input].flatten(0, -2).to(product.scalar_type());
      const Tensor of_weights = product.t().mm(x);
      Tensor of_biases;
      int64_t first = 0;
      for (size_t i = 0; i < 3; ++i) {
        if (shared.at[i] != input) continue;
        const Tensor& weight = kept[i];
        const int64_t width = fixed_size(weight, 0) * fixed_size(weight, 1);
        if (ctx->needs_input_grad(i))
          grads[i] =
              of_weights.narrow(0, first, width).view_symint(weight.sym_sizes()).to(weight.scalar_type());
        if (const size_t at = shared.bias[i]; at != 0 && ctx->needs_input_grad(at)) {
          if (!of_biases.defined()) of_biases = product.sum(0);
          grads[at] =
              of_biases.narrow(0, first, width).view_symint(kept[at].sym_sizes()).to(kept[at].scalar_type());
        }
        first += width;
      }
      shared.advance_sums();
    }
    for (auto& chunk : shared.of_chunk) chunk.products.clear();
    return grads;
  }
};

// Forward: q, k, v of a chunk. Backward: begins the sums of the inputs' gradients, and leaves the products' for `Weights`.
struct Project : torch::autograd::Function<Project> {
  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, at::TensorList weights, int64_t c,
                               const c10::intrusive_ptr<ProjectionState>& shared) {
    Tensors kept{weights[0], weights[1], weights[2]};
    // backward begins with the last chunk, and so with the gathering of all
    if (shared->split && c + 1 == shared->chunks_.count)
      kept.insert(kept.end(), shared->inputs.begin(), shared->inputs.end());
    ctx->save_for_backward(kept);
    ctx->saved_data["shared"] = c10::IValue::make_capsule(shared);
    ctx->saved_data["chunk"] = c;
    ctx->saved_data["weights"] = int64_t(weights.size());
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [q, k, v] = shared->project(c, inputs.vec(), weights.vec());
    return {q, k, v};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    for (const Tensor& grad : grads) once_differentiable(grad);
    ProjectionState& shared = shared_of(ctx);
    const variable_list kept = ctx->get_saved_variables();
    auto& chunk = shared.of_chunk[ctx->saved_data["chunk"].toInt()];
    const int64_t inputs = shared.trained.size(), weights = ctx->saved_data["weights"].toInt();
    bool for_weights = false;
    for (int64_t i = 0; i < weights; ++i) for_weights = for_weights || ctx->needs_input_grad(inputs + i);
    if (for_weights && kept.size() > 3)
      shared.wholes = begin_all_parts(Tensors(kept.begin() + 3, kept.end()), shared.sizes, *shared.split);
    chunk.products.clear();
    Tensors of_inputs;
    for (int64_t input = 0; input < inputs; ++input) {
      Tensors products, used;
      for (size_t i = 0; i < 3; ++i) {
        if (int64_t(shared.at[i]) != input) continue;
        products.push_back(
            (shared.batch_dim() == 0 ? grads[i].transpose(1, 2) : grads[i].permute({2, 0, 1, 3})).flatten(2));
        used.push_back(kept[i].flatten(0, 1).to(grads[i].scalar_type()));
      }
      const bool one = used.size() == 1;
      const Tensor product = one ? products[0] : at::cat(products, 2);
      if (for_weights) chunk.products.push_back(product);
      if (!shared.trained[input] || !ctx->needs_input_grad(input)) continue;
      std::vector<c10::SymInt> sizes{product.sym_size(0), product.sym_size(1), used[0].sym_size(1)};
      if (shared.split) sizes.insert(sizes.begin() + 1, 1);
      of_inputs.push_back(product.flatten(0, 1)
                              .mm(one ? used[0] : at::cat(used))
                              .view_symint(sizes)
                              .to(shared.dtypes[input]));
    }
    shared.advance_sums();
    if (!of_inputs.empty()) chunk.sums = shared.begin_sums(std::move(of_inputs));
    return variable_list(inputs + weights + 2);
  }
};

// Over the ranks whose parts make up what this one projects.
Split split_of(const Context& context) {
  return context.takes_parts ? context.head_split() : context.split();
}

// The parts as (B, 1, length, D), and the sizes of their wholes along the dim that is split.
std::pair<Tensors, std::vector<c10::SymInt>> parts_of(const Inputs& inputs, const Context& context) {
  const Split split = split_of(context);
  const int64_t of = context.takes_parts ? context.sizes.m : 1;
  Tensors xs;
  std::vector<c10::SymInt> sizes;
  for (const Tensor& x : inputs.distinct) {
    xs.push_back((context.batch_first ? x : x.transpose(0, 1)).unsqueeze(1));
    sizes.push_back((split.dim == 0  ? context.sizes.B
                     : sizes.empty() ? context.sizes.L
                                     : context.sizes.given_keys()) /
                    of);
    split.check_own(xs.back(), sizes.back());
  }
  return {xs, sizes};
}

bool any_trained(const Tensors& xs) {
  return at::GradMode::is_enabled() &&
         std::any_of(xs.begin(), xs.end(), [](const Tensor& x) { return x.requires_grad(); });
}

}  // namespace

Tensors whole_inputs(const Inputs& inputs, const Context& context) {
  const auto [xs, sizes] = parts_of(inputs, context);
  Tensors whole = gather_split(xs, sizes, context.split());
  for (Tensor& x : whole) x = x.squeeze(1);
  return whole;
}

GridProjection::GridProjection(const Inputs& inputs, const QkvWeights& weights, const Context& context,
                               const Chunking& chunks)
    : shared_(c10::make_intrusive<ProjectionState>()), weights_{weights.q, weights.k, weights.v} {
  ProjectionState& shared = *shared_;
  shared.chunks_ = chunks;
  shared.of_chunk.resize(chunks.count);
  shared.groups = over_grid(context.groups);
  shared.reduce_dtype = context.reduce_dtype;
  shared.batch_first = context.batch_first;
  shared.at = inputs.at;
  Tensors xs = inputs.distinct;
  if (context.splits()) {
    shared.split.emplace(split_of(context));
    std::tie(xs, shared.sizes) = parts_of(inputs, context);
  }
  for (const Tensor& x : xs) {
    shared.dtypes.push_back(x.scalar_type());
    shared.trained.push_back(any_trained({x}));
  }
  const std::array<const std::optional<Tensor>*, 3> biases{&weights.q_bias, &weights.k_bias, &weights.v_bias};
  for (size_t i = 0; i < 3; ++i) {
    if (!*biases[i]) continue;
    shared.bias[i] = weights_.size();
    weights_.push_back(**biases[i]);
  }
  // in this order: backward comes to the weights before it waits for the sums, and to both after all chunks
  begun_ = any_trained(xs) ? Enter::apply(at::TensorList(xs), shared_) : shared.begin_inputs(xs);
  if (any_trained(weights_)) {
    shared.inputs = xs;
    weights_ = Weights::apply(at::TensorList(weights_), shared_);
  }
}

GridProjection::~GridProjection() {
  shared_->inputs.clear();
}

std::tuple<Tensor, Tensor, Tensor> GridProjection::operator()(int64_t c) const {
  const size_t each = shared_->trained.size();
  const at::TensorList inputs = at::TensorList(begun_).slice(c * each, each);
  if (!any_trained(inputs.vec()) && !any_trained(weights_))
    return shared_->project(c, inputs.vec(), weights_);
  variable_list found = Project::apply(inputs, at::TensorList(weights_), c, shared_);
  return {found[0], found[1], found[2]};
}

}  // namespace two_level_mha
