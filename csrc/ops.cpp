// Every op of the package but the pass (pass_ops.cpp): its schema, with a comment, and those that are compositions of
// others.
//
// Letters: B batch, L query length, S key length, D embed dim, h, H query heads of all and of a group, K KV
// heads of a group, d, E head dim and its slice, n head groups, m slices.
#include "ops.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "split_ops.h"

namespace two_level_mha {

namespace {

std::tuple<Tensor, Tensor, Tensor> qkv_projection_op(const Tensor& query, const Tensor& key,
                                                     const Tensor& value, const Tensor& q_weight,
                                                     const Tensor& k_weight, const Tensor& v_weight,
                                                     const std::optional<Tensor>& q_bias,
                                                     const std::optional<Tensor>& k_bias,
                                                     const std::optional<Tensor>& v_bias, bool batch_first) {
  return qkv_projection(query, key, value, {q_weight, k_weight, v_weight, q_bias, k_bias, v_bias},
                        batch_first);
}

Group make_group(const std::string& name, int64_t size) {
  TORCH_CHECK_VALUE(size >= 1 && size <= kMaxRanks, "group_size must be positive, at most ", kMaxRanks,
                    ", got ", size);
  return {name, size};
}

Tensor all_gather_op(const Tensor& x, int64_t dim, int64_t group_size, std::string group) {
  const Group to = make_group(group, group_size);
  if (group_size == 1) return x;
  Tensor parts = start(Collective::all_gather, x.movedim(dim, 0).unsqueeze(0), to)();
  return parts.flatten(0, 1).movedim(0, dim);
}

Tensor reduce_scatter_op(const Tensor& x, int64_t dim, int64_t group_size, std::string group) {
  const Group to = make_group(group, group_size);
  if (group_size == 1) return x;
  Tensor parts =
      x.movedim(dim, 0).unflatten_symint(0, {c10::SymInt(group_size), x.sym_size(dim) / group_size});
  return start(Collective::reduce_scatter, parts, to)().squeeze(0).movedim(0, dim);
}

Tensor all_to_all_op(const Tensor& x, int64_t split_dim, int64_t cat_dim, int64_t group_size,
                     std::string group) {
  const Group to = make_group(group, group_size);
  if (group_size == 1) return x;
  split_dim = at::maybe_wrap_dim(split_dim, x.dim()), cat_dim = at::maybe_wrap_dim(cat_dim, x.dim());
  Tensor parts = x.unflatten_symint(split_dim, {c10::SymInt(group_size), x.sym_size(split_dim) / group_size})
                     .movedim(split_dim, 0);
  Tensor moved = start(Collective::all_to_all, parts, to)();
  return moved.movedim(0, cat_dim).flatten(cat_dim, cat_dim + 1);
}

Tensor all_reduce_op(const Tensor& x, int64_t group_size, std::string group) {
  return reduce_replicated(x, {make_group(group, group_size), {}}, std::nullopt);
}

Tensor hierarchical_all_gather_op(const Tensor& x, int64_t head_dim, int64_t slice_dim, at::IntArrayRef grid,
                                  std::string slice_group, std::string head_group, bool slices_first,
                                  bool replicated) {
  check_grid(grid);
  const std::vector<GatherStage> stages{
      {at::maybe_wrap_dim(head_dim, x.dim()), {head_group, grid[0], grid[2]}},
      {at::maybe_wrap_dim(slice_dim, x.dim()), {slice_group, grid[1], grid[3]}}};
  return hierarchical_all_gather(x, stages, slices_first, replicated);
}

using Tensors = std::vector<Tensor>;

Tensors replicated_op(at::TensorList xs, int64_t group_size, std::string group,
                      std::optional<at::ScalarType> reduce_dtype) {
  return enter_replicated(xs.vec(), {make_group(group, group_size), {}}, reduce_dtype);
}

}  // namespace

// clang-format off
TORCH_LIBRARY(two_level_mha, library) {
  // A rank's own heads and slice of q, k, v: x W^T + b, (B, L, D) and (H, E, D) ->
  // (B, H, L, E). One GEMM when the three inputs are one tensor of many tokens.
  library.def(
      "qkv_projection("
      "Tensor query, "
      "Tensor key, "
      "Tensor value, "
      "Tensor q_weight, "
      "Tensor k_weight, "
      "Tensor v_weight, "
      "Tensor? q_bias=None, "
      "Tensor? k_bias=None, "
      "Tensor? v_bias=None, "
      "bool batch_first=True"
      ") -> (Tensor q, Tensor k, Tensor v)",
      qkv_projection_op);

  // softmax(softcap(scale q k^T) + mask) v and its logsumexp, for whatever part of the keys, values or
  // rows is given; csrc/attend/contract.h is the contract. kernel_name: the one that must serve the call,
  // of csrc/attend/kernels.h; a ValueError if it cannot. ("kernel" is an argument of inductor's own.)
  library.def(
      "partial_attention("
      "Tensor q, "
      "Tensor k, "
      "Tensor v, "
      "Tensor? attn_mask=None, "
      "*, "
      "float? scale=None, "
      "SymInt? causal=None, "
      "SymInt? window=None, "
      "float softcap=0., "
      "float dropout_p=0., "
      "Tensor? seed=None, "
      "SymInt[] origin=[0, 0, 0], "
      "SymInt key_stride=1, "
      "str kernel_name=''"
      ") -> (Tensor out, Tensor logsumexp)");

  // Gradients of q, k, v, and of attn_mask if mask_grad, else an empty tensor.
  library.def(
      "partial_attention_backward("
      "Tensor grad_out, "
      "Tensor? grad_logsumexp, "
      "Tensor q, "
      "Tensor k, "
      "Tensor v, "
      "Tensor out, "
      "Tensor logsumexp, "
      "bool mask_grad, "
      "Tensor? attn_mask=None, "
      "*, "
      "float? scale=None, "
      "SymInt? causal=None, "
      "SymInt? window=None, "
      "float softcap=0., "
      "float dropout_p=0., "
      "Tensor? seed=None, "
      "SymInt[] origin=[0, 0, 0], "
      "SymInt key_stride=1, "
      "str kernel_name=''"
      ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)");

  // Which elements dropout keeps: bool of `sizes` (b, h, l, s),
  // whose element [0, 0, 0] is global `origin` (batch, head, row).
  library.def("dropout_keep_mask(Tensor seed, float p, SymInt[] sizes, SymInt[] origin=[0, 0, 0]) -> Tensor");

  // Attention over all keys from attention over disjoint
  // parts of them: (parts, B, H, L, Dv) and (parts, B, H, L).
  library.def("merge_partials(Tensor outs, Tensor logsumexps) -> (Tensor out, Tensor logsumexp)");

  // 4-D tensors into one buffer (parts, N) and back;
  // csrc/comm/pack.h is the contract. Each is the other's adjoint.
  library.def("pack(Tensor[] tensors, int[] dims, int parts, bool zigzag=False) -> Tensor");
  library.def("unpack(Tensor buffer, SymInt[] sizes, int[] dims, int parts, bool zigzag=False) -> Tensor[]");

  // Concatenation along dim over the group. Adjoint:
  // reduce_scatter, since each rank uses the whole in its own way.
  library.def("all_gather(Tensor x, int dim, int group_size, str group) -> Tensor", all_gather_op);

  // A rank's piece along dim of the sum over the group. Adjoint: all_gather.
  library.def("reduce_scatter(Tensor x, int dim, int group_size, str group) -> Tensor", reduce_scatter_op);

  // Pieces along split_dim are exchanged and concatenated
  // along cat_dim. Adjoint: the same with the dims swapped.
  library.def("all_to_all(Tensor x, int split_dim, int cat_dim, int group_size, str group) -> Tensor",
              all_to_all_op);

  // The same exchanges by Gloo's messages, csrc/comm/pairs.h; not differentiable. wait: it has ended, instead of being
  // waited for by "_c10d_functional::wait_tensor".
  library.def("_all_to_all_pairs(Tensor input, SymInt[] output_split_sizes, SymInt[] input_split_sizes, str group_name, "
              "bool wait=True) -> Tensor");
  library.def("_all_gather_pairs(Tensor input, int group_size, str group_name, bool wait=True) -> Tensor");

  // The sum over the group, used alike by every rank. Adjoint: identity.
  library.def("all_reduce(Tensor x, int group_size, str group) -> Tensor", all_reduce_op);

  // Identity on tensors that are the same on every rank and are used
  // differently by each. Adjoint: the sum over the group, in one exchange.
  library.def("replicated(Tensor[] xs, int group_size, str group, ScalarType? reduce_dtype=None) -> Tensor[]",
              replicated_op);

  // head_dim gathered over the head axis and slice_dim over the slice axis, head
  // axis first unless slices_first; grid is (n, m, i, j). replicated: every rank
  // uses the whole alike, the adjoint is its own block; else a reduce-scatter.
  library.def(
      "hierarchical_all_gather("
      "Tensor x, "
      "int head_dim, "
      "int slice_dim, "
      "int[] grid, "
      "str slice_group, "
      "str head_group, "
      "bool slices_first=False, "
      "bool replicated=False"
      ") -> Tensor",
      hierarchical_all_gather_op);

  // x (B, L, ..), alike on every rank -> this rank's sequences, or its rows of every one: comm/split.h. Backward: those
  // of all ranks. And the whole, of `size` sequences or rows; backward: this rank's part.
  library.def("shard_activations(Tensor x, bool rows, int[] grid, str group) -> Tensor", shard_activations_op);
  library.def("gather_activations(Tensor x, SymInt size, bool rows, int[] grid, str group) -> Tensor",
              gather_activations_op);

  // An MLP of split activations: X of all ranks through each weight, x W^T + b, and this rank's part of the
  // sum of the ranks' products: comm/split_linear.h. The bias is added once, and its gradient is alike.
  library.def(
      "project_activations("
      "Tensor x, "
      "Tensor[] weights, "
      "Tensor?[] biases, "
      "SymInt size, "
      "bool rows, "
      "int[] grid, "
      "str group, "
      "ScalarType? reduce_dtype=None"
      ") -> Tensor[]",
      project_activations_op);
  library.def(
      "sum_activations("
      "Tensor x, "
      "Tensor? bias, "
      "bool rows, "
      "int[] grid, "
      "str group, "
      "ScalarType? reduce_dtype=None"
      ") -> Tensor",
      sum_activations_op);

  // What the ranks of a grid compare in a call: csrc/comm/seal.h. The hash of what a rank was given, an int64;
  // its digits as they ride in an exchange; a copy of y, if the sums of all ranks' digits are of equal ones:
  // compiled calls have no other way to depend on it; what the sums say, for a host that looks later.
  library.def("seal(Tensor[] xs, SymInt[] numbers, str text, Tensor? before=None) -> Tensor");
  library.def("seal_digits(Tensor seal, ScalarType dtype, int group_size) -> Tensor");
  library.def("seal_verdict(Tensor sums, Tensor seal, int group_size, Tensor(a!) verdict) -> ()");
  library.def("opened(Tensor y, Tensor sums, Tensor seal, int group_size, str group, str layer) -> Tensor");

  // What needs d whole, between the halves. The first r dims of x (B, H, L, d)
  // turned in pairs by the angles of its tokens: cos, sin (B or 1, 1, L, r).
  library.def("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor", rotary);

  // RMS norm of every head: x (B, H, L, d), weight (d,).
  library.def("head_norm(Tensor x, Tensor weight, float eps) -> Tensor", head_norm);

  // Both, of q and k: csrc/head/norm_rotary.h.
  library.def(
      "norm_rotary(Tensor q, Tensor k, Tensor[] weights, float eps, Tensor[] q_angles, Tensor[] k_angles, "
      "bool interleaved=False) -> (Tensor q, Tensor k)",
      norm_rotary);
}
// clang-format on

}  // namespace two_level_mha
