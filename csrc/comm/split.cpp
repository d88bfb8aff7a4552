#include "split.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../base/arithmetic.h"
#include "../base/sizes.h"
#include "pack.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

int64_t ranks(const Split& split) {
  return split.head_groups * split.slices;
}

c10::SymInt chunk_of(const Split& split, const c10::SymInt& size) {
  return ceil_div(size, ranks(split) * (split.dim == 2 ? 2 : 1));
}

// Parts in their order -> in the order of the ranks, or the other way round.
Tensor reordered(const Tensor& parts, int64_t outer, int64_t inner) {
  if (outer == 1 || inner == 1) return parts;
  return parts.unflatten(0, {outer, inner}).transpose(0, 1).flatten(0, 1);
}

// This rank's part with each chunk filled up with zeros, or without them again.
Tensor filled(const Tensor& x, const c10::SymInt& size, const Split& split, bool fill) {
  const auto chunk = chunk_of(split, size);
  std::vector<Tensor> chunks;
  c10::SymInt first = 0;
  bool full = true;
  for (const auto& run : split.runs(size)) {
    const auto count = run.second;
    full = full && count.maybe_as_int() == chunk.maybe_as_int();
    Tensor rows = x.narrow_symint(split.dim, first, count);
    chunks.push_back(fill ? pad_dim(rows, split.dim, 0, chunk - count) : rows);
    first = first + (fill ? count : chunk);
  }
  return full ? x : at::cat(chunks, split.dim);
}

Tensor own_part(const Tensor& x, const Split& split) {
  std::vector<Tensor> chunks;
  for (const auto& [first, count] : split.runs(x.sym_size(split.dim)))
    chunks.push_back(x.narrow_symint(split.dim, first, count));
  return at::cat(chunks, split.dim);
}

struct SavedSplit : torch::CustomClassHolder {
  Split split;

  explicit SavedSplit(const Split& split) : split(split) {}
};

const SavedSplit& saved(AutogradContext* ctx) {
  return *c10::static_intrusive_pointer_cast<SavedSplit>(ctx->saved_data["split"].toCapsule());
}

struct GatherSplit : torch::autograd::Function<GatherSplit> {
  static variable_list forward(AutogradContext* ctx, at::TensorList xs, std::vector<c10::SymInt> sizes,
                               const c10::intrusive_ptr<SavedSplit>& how) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["split"] = c10::IValue::make_capsule(how);
    at::AutoDispatchBelowADInplaceOrView guard;
    return begin_all_parts(xs, sizes, how->split)();
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(grads.size() + 2);
    for (size_t i = 0; i < grads.size(); ++i) {
      once_differentiable(grads[i]);
      if (grads[i].defined()) out[i] = own_part(grads[i], saved(ctx).split);
    }
    return out;
  }
};

struct KeepSplit : torch::autograd::Function<KeepSplit> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const c10::intrusive_ptr<SavedSplit>& how) {
    ctx->saved_data["split"] = c10::IValue::make_capsule(how);
    ctx->saved_data["size"] = x.sym_size(how->split.dim);
    at::AutoDispatchBelowADInplaceOrView guard;
    return own_part(x, how->split);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once_differentiable(grads[0]);
    return {begin_all_parts(grads, {ctx->saved_data["size"].toSymInt()}, saved(ctx).split)()[0], Tensor()};
  }
};

}  // namespace

std::vector<std::pair<c10::SymInt, c10::SymInt>> Split::runs(const c10::SymInt& size) const {
  const auto chunk = chunk_of(*this, size);
  const int64_t chunks = ranks(*this) * (dim == 2 ? 2 : 1);
  // a graph is of all sizes with full chunks, or of one
  const bool full = !size.maybe_as_int() && size % chunks == 0;
  if (!full) size.guard_int(__FILE__, __LINE__);
  auto run = [&](int64_t number) {
    if (full) return std::pair(chunk * number, chunk);
    const auto first = (chunk * number).min(size);
    return std::pair(first, (size - first).min(chunk));
  };
  if (dim != 2) return {run(part)};
  return {run(part), run(2 * head_groups * slices - 1 - part)};
}

void Split::check_own(const Tensor& x, const c10::SymInt& size) const {
  const auto want = own(size).maybe_as_int(), got = x.sym_size(dim).maybe_as_int();
  TORCH_CHECK_VALUE(!want || !got || *want == *got, "this rank's part of ", size,
                    dim == 0 ? " sequences is " : " rows is ", *want, ", got ", *got);
}

c10::SymInt Split::own(const c10::SymInt& size) const {
  c10::SymInt count = 0;
  for (const auto& run : runs(size)) count = count + run.second;
  return count;
}

Later<std::vector<Tensor>> begin_all_parts(at::TensorList xs, const std::vector<c10::SymInt>& sizes,
                                           const Split& split) {
  if (ranks(split) == 1) return [xs = xs.vec()] { return xs; };
  std::vector<Tensor> flat;
  std::vector<c10::SymInt> shapes;
  for (size_t i = 0; i < xs.size(); ++i) {
    flat.push_back(filled(xs[i], sizes[i], split, true).reshape(-1));
    auto shape = xs[i].sym_sizes().vec();
    shape[split.dim] = sizes[i];
    shapes.insert(shapes.end(), shape.begin(), shape.end());
  }
  Tensor mine = flat.size() == 1 ? flat[0] : at::cat(flat);
  auto parts = begin_run(Collective::all_gather, mine.unsqueeze(0), split.grid);
  return [=, dims = std::vector<int64_t>(xs.size(), split.dim)]() mutable {
    const Tensor buffer = reordered(parts(), split.head_groups, split.slices);  // what came is freed here
    return unpack(buffer, shapes, dims, ranks(split), /*zigzag=*/true);
  };
}

Later<std::vector<Tensor>> begin_sum_parts(std::vector<Tensor> xs, const Split& split,
                                           std::optional<at::ScalarType> reduce_dtype,
                                           const std::optional<Seal>& seal) {
  const int64_t P = ranks(split);
  if (P == 1 && !seal) return [=] { return xs; };
  const auto dtype = xs[0].scalar_type();
  std::vector<std::vector<c10::SymInt>> shapes;
  for (const Tensor& x : xs) shapes.push_back(x.sym_sizes().vec());
  Tensor parts = pack(xs, std::vector<int64_t>(xs.size(), split.dim), P, /*zigzag=*/true);
  xs.clear();  // before there is another of their size
  parts = reordered(parts, split.slices, split.head_groups);
  if (reduce_dtype) parts = parts.to(*reduce_dtype);
  if (seal) parts = at::cat({parts, digits_of(*seal, parts).expand({P, -1})}, 1);
  auto coming = begin_run(Collective::reduce_scatter, parts, split.grid);
  return [=]() mutable {
    Tensor mine = coming().squeeze(0);
    std::vector<Tensor> sums;
    c10::SymInt first = 0;
    for (auto shape : shapes) {
      const auto size = shape[split.dim];
      shape[split.dim] = chunk_of(split, size) * (split.dim == 2 ? 2 : 1);
      c10::SymInt elements = 1;
      for (const auto& extent : shape) elements = elements * extent;
      Tensor part = mine.narrow_symint(0, first, elements).view_symint(shape);
      sums.push_back(filled(part, size, split, false).to(dtype));
      first = first + elements;
    }
    if (seal) sums.push_back(mine.narrow_symint(0, first, mine.sym_size(0) - first));
    return sums;
  };
}

std::vector<Tensor> gather_split(const std::vector<Tensor>& xs, const std::vector<c10::SymInt>& sizes,
                                 const Split& split) {
  return GatherSplit::apply(at::TensorList(xs), sizes, c10::make_intrusive<SavedSplit>(split));
}

Tensor keep_split(const Tensor& x, const Split& split) {
  return KeepSplit::apply(x, c10::make_intrusive<SavedSplit>(split));
}

Later<Tensor> begin_sum_split(const Tensor& x, const std::optional<Tensor>& bias, const Split& split,
                              std::optional<at::ScalarType> reduce_dtype, const std::optional<Seal>& seal) {
  if (ranks(split) == 1 && !bias && !seal) return [=] { return x; };
  std::vector<Tensor> inputs{x};
  if (bias) inputs.push_back(*bias);
  const bool rides = seal && seal->grid.size == ranks(split);
  auto forward = [=](const std::vector<Tensor>& xs) -> Later<Tensor> {
    auto coming = begin_sum_parts({xs[0]}, split, reduce_dtype, rides ? seal : std::nullopt);
    return [=, alone = ranks(split) == 1, to = bias] {
      std::vector<Tensor> sums = coming();
      Tensor y = alone ? sums[0].view_as(sums[0]) : sums[0];
      if (seal) y = opened(y, rides ? sums[1] : sum_in_group(digits_of(*seal, y), seal->grid), *seal);
      return to ? y + to->to(y.scalar_type()) : y;
    };
  };
  auto backward = [split, size = x.sym_size(split.dim), trained = bias && bias->requires_grad(),
                   with = !!bias, dtype = bias ? bias->scalar_type() : x.scalar_type()](
                      const Tensor& gradient) -> Later<std::vector<Tensor>> {
    auto coming = begin_all_parts({gradient}, {size}, split);
    return [=] {
      std::vector<Tensor> found = coming();
      if (with) found.emplace_back();
      if (trained) found[1] = found[0].sum(at::IntArrayRef{0, 1, 2}).to(dtype);
      return found;
    };
  };
  return begin(inputs, forward, backward);
}

}  // namespace two_level_mha
