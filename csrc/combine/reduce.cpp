#include "reduce.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "../arithmetic.h"
#include "../sizes.h"
#include "../traffic.h"
#include "trained.h"

namespace two_level_mha {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// What a Function keeps of the groups for its backward.
void save(AutogradContext* ctx, const Groups& groups) {
  ctx->saved_data["names"] = std::vector<std::string>{groups.slice.name, groups.head.name, groups.grid.name};
  ctx->saved_data["sizes"] = std::vector<int64_t>{groups.slice.size, groups.head.size, groups.grid.size,
                                                  groups.slice_rank, groups.head_rank};
}

Groups load(AutogradContext* ctx) {
  auto names = ctx->saved_data["names"].toListRef();
  auto sizes = ctx->saved_data["sizes"].toIntVector();
  return {{names[0].toStringRef(), sizes[0]},
          {names[1].toStringRef(), sizes[1]},
          {names[2].toStringRef(), sizes[2]},
          sizes[3],
          sizes[4]};
}

// The gather of one stage: x of any shape -> (g, ...).
Tensor gather_stage(const Tensor& x, const Group& group) {
  if (group.size == 1) return x.unsqueeze(0);
  auto sizes = x.sym_sizes().vec();
  sizes.insert(sizes.begin(), group.size);
  return run(Collective::all_gather, x.reshape({1, -1}), group).view_symint(sizes);
}

Tensor scatter_stage(const Tensor& parts, const Group& group) {
  if (group.size == 1) return parts.squeeze(0);
  auto sizes = parts.sym_sizes().slice(1).vec();
  return run(Collective::reduce_scatter, parts.reshape({group.size, -1}), group).view_symint(sizes);
}

struct ReduceReplicated : torch::autograd::Function<ReduceReplicated> {
  static Tensor forward(AutogradContext*, const Tensor& x, const Groups& groups,
                        std::optional<at::ScalarType> reduce_dtype) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return sum_over_grid(x, groups, reduce_dtype);
  }
  static variable_list backward(AutogradContext*, variable_list grads) {
    once_differentiable(grads[0]);
    return {grads[0], Tensor(), Tensor()};
  }
};

struct EnterReplicated : torch::autograd::Function<EnterReplicated> {
  static variable_list forward(AutogradContext* ctx, at::TensorList xs, const Groups& groups,
                               std::optional<at::ScalarType> reduce_dtype) {
    ctx->set_materialize_grads(false);
    save(ctx, groups);
    ctx->saved_data["reduce_dtype"] = reduce_dtype;
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list out;
    for (const Tensor& x : xs) out.push_back(x.view_as(x));
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto reduce_dtype = ctx->saved_data["reduce_dtype"].toOptional<at::ScalarType>();
    std::vector<Tensor> flat;
    std::vector<c10::SymInt> lengths;
    for (const Tensor& grad : grads)
      if (grad.defined()) {
        flat.push_back(grad.reshape(-1));
        lengths.push_back(grad.sym_numel());
      }
    variable_list out(grads.size() + 2);
    if (flat.empty()) return out;
    Tensor sum = sum_over_grid(flat.size() == 1 ? flat[0] : at::cat(flat), load(ctx), reduce_dtype);
    std::vector<Tensor> parts = at::split_with_sizes_symint(sum, lengths);
    size_t next = 0;
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) out[i] = parts[next++].view_symint(grads[i].sym_sizes());
    return out;
  }
};

struct HierarchicalAllGather : torch::autograd::Function<HierarchicalAllGather> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t head_dim, int64_t slice_dim,
                        const Groups& groups, bool slices_first, bool replicated) {
    save(ctx, groups);
    ctx->saved_data["dims"] = std::vector<int64_t>{head_dim, slice_dim, slices_first, replicated};
    at::AutoDispatchBelowADInplaceOrView guard;
    // (n, m, ...) whichever stage came first
    Tensor parts =
        slices_first ? gather_stage(gather_stage(x.contiguous(), groups.slice), groups.head)
                     : gather_stage(gather_stage(x.contiguous(), groups.head), groups.slice).transpose(0, 1);
    std::vector<int64_t> order;
    std::vector<c10::SymInt> sizes;
    for (int64_t dim = 0; dim < x.dim(); ++dim) {
      if (dim == head_dim) order.push_back(0);
      if (dim == slice_dim) order.push_back(1);
      order.push_back(dim + 2);
      sizes.push_back(x.sym_size(dim) * (dim == head_dim ? groups.head.size : 1) *
                      (dim == slice_dim ? groups.slice.size : 1));
    }
    Tensor whole = parts.permute(order).reshape_symint(sizes);
    return whole.is_alias_of(x) ? whole.clone() : whole;  // a function must not return a view of its input
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once_differentiable(grads[0]);
    Groups groups = load(ctx);
    auto dims = ctx->saved_data["dims"].toIntVector();
    int64_t head_dim = dims[0], slice_dim = dims[1];
    const int64_t n = groups.head.size, m = groups.slice.size;
    Tensor grad;
    if (dims[3]) {
      auto H = grads[0].sym_size(head_dim) / n, E = grads[0].sym_size(slice_dim) / m;
      grad = grads[0]
                 .narrow_symint(head_dim, H * groups.head_rank, H)
                 .narrow_symint(slice_dim, E * groups.slice_rank, E)
                 .contiguous();
    } else {
      std::vector<c10::SymInt> sizes;
      std::vector<int64_t> order{-1, -1};
      for (int64_t dim = 0; dim < grads[0].dim(); ++dim) {
        auto size = grads[0].sym_size(dim);
        if (dim == head_dim) {
          order[0] = sizes.size();
          sizes.push_back(n);
          size = size / n;
        }
        if (dim == slice_dim) {
          order[1] = sizes.size();
          sizes.push_back(m);
          size = size / m;
        }
        order.push_back(sizes.size());
        sizes.push_back(size);
      }
      Tensor parts = grads[0].reshape_symint(sizes).permute(order);  // (n, m, ...)
      grad = dims[2]
                 ? scatter_stage(scatter_stage(parts.contiguous(), groups.head).contiguous(), groups.slice)
                 : scatter_stage(scatter_stage(parts.transpose(0, 1).contiguous(), groups.slice).contiguous(),
                                 groups.head);
    }
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor sum_over_grid(const Tensor& x, const Groups& groups, std::optional<at::ScalarType> reduce_dtype) {
  if (groups.grid.size == 1) return x;
  Tensor y = reduce_dtype ? x.to(*reduce_dtype) : x;
  if (sums_flat(y.sym_numel(), groups.head.size, groups.slice.size)) {
    y = sum_in_group(y, groups.grid);
  } else {
    const int64_t m = groups.slice.size;
    auto elements = y.sym_numel();
    auto padded = ceil_div(elements, m) * m;
    Tensor flat = pad_dim(y.reshape(-1), 0, 0, padded - elements).view_symint({m, padded / m});
    Tensor mine = run(Collective::reduce_scatter, flat, groups.slice);
    Tensor all = run(Collective::all_gather, sum_in_group(mine, groups.head), groups.slice);
    y = all.view(-1).narrow_symint(0, 0, elements).view_symint(x.sym_sizes());
  }
  return y.to(x.scalar_type());
}

Tensor reduce_replicated(const Tensor& x, const Groups& groups, std::optional<at::ScalarType> reduce_dtype) {
  return groups.grid.size == 1 ? x : ReduceReplicated::apply(x, groups, reduce_dtype);
}

std::vector<Tensor> enter_replicated(const std::vector<Tensor>& xs, const Groups& groups,
                                     std::optional<at::ScalarType> reduce_dtype) {
  if (groups.grid.size == 1) return xs;
  return where_trained(
      xs, [&](at::TensorList trained) { return EnterReplicated::apply(trained, groups, reduce_dtype); });
}

Tensor hierarchical_all_gather(const Tensor& x, int64_t head_dim, int64_t slice_dim, const Groups& groups,
                               bool slices_first, bool replicated) {
  if (groups.grid.size == 1) return x;
  return HierarchicalAllGather::apply(x, head_dim, slice_dim, groups, slices_first, replicated);
}

}  // namespace two_level_mha
