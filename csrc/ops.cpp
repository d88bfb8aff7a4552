// Every op of the package: its schema, with a comment, and the ops that are compositions of others.
//
// Letters: B batch, L query length, S key length, D embed dim, h, H query heads of all and of a group, K KV
// heads of a group, d, E head dim and its slice, n head groups, m slices.
#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/WrapDimUtils.h>
#include <torch/library.h>

namespace two_level_mha {

namespace {

Place make_place(at::IntArrayRef grid, const std::string& slice_group, const std::string& head_group,
                 const std::string& grid_group, const std::string& scheme, bool whole_heads,
                 const std::string& combine, bool causal, std::optional<at::ScalarType> reduce_dtype) {
  TORCH_CHECK_VALUE(combine == "reduce" || combine == "concat", "combine must be 'reduce' or 'concat', got '",
                    combine, "'");
  TORCH_CHECK_VALUE(grid.size() == 4, "grid must be (head_groups, slices, head_group, slice), got ",
                    grid.size(), " numbers");
  TORCH_CHECK_VALUE(
      grid[0] >= 1 && grid[1] >= 1 && 0 <= grid[2] && grid[2] < grid[0] && 0 <= grid[3] && grid[3] < grid[1],
      "grid must be (n, m, i, j) with 0 <= i < n and 0 <= j < m, got ", grid);
  Place place;
  place.grid = {grid[0], grid[1]};
  place.head_group = grid[2];
  place.slice = grid[3];
  place.groups = {
      {slice_group, grid[1]}, {head_group, grid[0]}, {grid_group, grid[0] * grid[1]}, grid[3], grid[2]};
  place.scheme = scheme_from_name(scheme);
  const Storage storage =
      place.scheme == Scheme::automatic ? Storage::either : scheme_row(place.scheme).storage;
  TORCH_CHECK_VALUE(storage == Storage::either || (storage == Storage::whole_heads) == whole_heads,
                    "scheme '", scheme, "' needs the query side stored by ",
                    storage == Storage::whole_heads ? "whole heads" : "slices of every head");
  place.causal = causal;
  place.whole_heads = whole_heads;
  place.concat = combine == "concat";
  place.reduce_dtype = reduce_dtype;
  return place;
}

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
  TORCH_CHECK_VALUE(size >= 1, "group_size must be positive, got ", size);
  return {name, size};
}

Tensor all_gather_op(const Tensor& x, int64_t dim, int64_t group_size, std::string group) {
  const Group to = make_group(group, group_size);
  if (group_size == 1) return x;
  Tensor parts = start(Collective::all_gather, x.movedim(dim, 0).unsqueeze(0), to).wait();
  return parts.flatten(0, 1).movedim(0, dim);
}

Tensor reduce_scatter_op(const Tensor& x, int64_t dim, int64_t group_size, std::string group) {
  const Group to = make_group(group, group_size);
  if (group_size == 1) return x;
  Tensor parts =
      x.movedim(dim, 0).unflatten_symint(0, {c10::SymInt(group_size), x.sym_size(dim) / group_size});
  return start(Collective::reduce_scatter, parts, to).wait().squeeze(0).movedim(0, dim);
}

Tensor all_to_all_op(const Tensor& x, int64_t split_dim, int64_t cat_dim, int64_t group_size,
                     std::string group) {
  const Group to = make_group(group, group_size);
  if (group_size == 1) return x;
  split_dim = at::maybe_wrap_dim(split_dim, x.dim()), cat_dim = at::maybe_wrap_dim(cat_dim, x.dim());
  Tensor parts = x.unflatten_symint(split_dim, {c10::SymInt(group_size), x.sym_size(split_dim) / group_size})
                     .movedim(split_dim, 0);
  Tensor moved = start(Collective::all_to_all, parts, to).wait();
  return moved.movedim(0, cat_dim).flatten(cat_dim, cat_dim + 1);
}

Tensor all_reduce_op(const Tensor& x, int64_t group_size, std::string group) {
  Groups groups;
  groups.head = groups.grid = make_group(group, group_size);
  return reduce_replicated(x, groups, std::nullopt);
}

Tensor hierarchical_all_gather_op(const Tensor& x, int64_t head_dim, int64_t slice_dim, at::IntArrayRef grid,
                                  std::string slice_group, std::string head_group, bool slices_first,
                                  bool replicated) {
  Groups groups =
      make_place(grid, slice_group, head_group, "", "auto", false, "reduce", false, std::nullopt).groups;
  return hierarchical_all_gather(x, at::maybe_wrap_dim(head_dim, x.dim()),
                                 at::maybe_wrap_dim(slice_dim, x.dim()), groups, slices_first, replicated);
}

std::tuple<Tensor, Tensor, Tensor> enter_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& q_weight,
    const Tensor& k_weight, const Tensor& v_weight, const std::optional<Tensor>& q_bias,
    const std::optional<Tensor>& k_bias, const std::optional<Tensor>& v_bias,
    const std::optional<Tensor>& bias_k, const std::optional<Tensor>& bias_v, bool add_zero_attn,
    bool batch_first, bool causal, at::IntArrayRef grid, std::string slice_group, std::string head_group,
    std::string grid_group, std::string scheme, bool whole_heads, std::string combine,
    std::optional<at::ScalarType> reduce_dtype, c10::SymInt position) {
  Place place = make_place(grid, slice_group, head_group, grid_group, scheme, whole_heads, combine, causal,
                           reduce_dtype);
  return enter(query, key, value, {q_weight, k_weight, v_weight, q_bias, k_bias, v_bias},
               {bias_k, bias_v, add_zero_attn}, place, batch_first, position);
}

struct LeaveArguments {
  Attend attend;
  Output output;
  Place place;
};

#define TLM_LEAVE_PARAMETERS                                                                                 \
  const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &out_weight,                               \
      const std::optional<Tensor>&out_bias, const std::optional<Tensor>&attn_mask, c10::SymInt batch,        \
      c10::SymInt length, std::optional<double> scale, std::optional<c10::SymInt> causal,                    \
      std::optional<c10::SymInt> window, double softcap, double dropout_p, const std::optional<Tensor>&seed, \
      bool batch_first, at::IntArrayRef grid, std::string slice_group, std::string head_group,               \
      std::string grid_group, std::string scheme, bool whole_heads, std::string combine,                     \
      std::optional<at::ScalarType> reduce_dtype, c10::SymInt position, c10::SymInt first_key

LeaveArguments leave_arguments(TLM_LEAVE_PARAMETERS) {
  return {{attn_mask, scale, causal, window, softcap, dropout_p, seed},
          {out_weight, out_bias, batch_first, batch, length, position, first_key},
          make_place(grid, slice_group, head_group, grid_group, scheme, whole_heads, combine,
                     causal.has_value(), reduce_dtype)};
}

#define TLM_LEAVE_ARGUMENTS                                                                                 \
  q, k, v, out_weight, out_bias, attn_mask, batch, length, scale, causal, window, softcap, dropout_p, seed, \
      batch_first, grid, slice_group, head_group, grid_group, scheme, whole_heads, combine, reduce_dtype,   \
      position, first_key

Tensor leave_op(TLM_LEAVE_PARAMETERS) {
  auto a = leave_arguments(TLM_LEAVE_ARGUMENTS);
  return leave(q, k, v, a.attend, a.output, a.place);
}

std::tuple<Tensor, Tensor> leave_with_weights_op(TLM_LEAVE_PARAMETERS, bool average) {
  auto a = leave_arguments(TLM_LEAVE_ARGUMENTS);
  return leave_with_weights(q, k, v, a.attend, a.output, a.place, average);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> deal_rows_op(
    at::TensorList xs, const Tensor& q, const Tensor& k, const Tensor& out_weight, c10::SymInt batch,
    c10::SymInt length, bool causal, at::IntArrayRef grid, std::string slice_group, std::string head_group,
    std::string grid_group, std::string scheme, bool whole_heads, std::string combine, c10::SymInt position) {
  Place place = make_place(grid, slice_group, head_group, grid_group, scheme, whole_heads, combine, causal,
                           std::nullopt);
  auto dealt = deal_rows(xs.vec(), q, k, {out_weight, std::nullopt, true, batch, length, position}, place);
  return {dealt.queries, dealt.keys};
}

std::vector<Tensor> replicated_op(at::TensorList xs, int64_t group_size, std::string group,
                                  std::optional<at::ScalarType> reduce_dtype) {
  Groups groups;
  groups.head = groups.grid = make_group(group, group_size);
  return enter_replicated(xs.vec(), groups, reduce_dtype);
}

}  // namespace

TORCH_LIBRARY(two_level_mha, library) {
  // A rank's own heads and slice of q, k, v: x W^T + b, (B, L, D) and (H, E, D) -> (B, H, L, E). One GEMM
  // when the three inputs are one tensor of many tokens.
  library.def(
      "qkv_projection(Tensor query, Tensor key, Tensor value, Tensor q_weight, Tensor k_weight, Tensor "
      "v_weight, "
      "Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None, bool batch_first=True) "
      "-> (Tensor, Tensor, Tensor)",
      qkv_projection_op);

  // softmax(softcap(scale q k^T) + mask) v and its logsumexp, for whatever part of the keys, values or rows
  // is given; csrc/attend/contract.h is the contract. kernel_name: the one that must serve the call,
  // of csrc/attend/kernels.h; a ValueError if it cannot. ("kernel" is an argument of inductor's own.)
  library.def(
      "partial_attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, *, float? scale=None, "
      "SymInt? causal=None, SymInt? window=None, float softcap=0., float dropout_p=0., Tensor? seed=None, "
      "SymInt[] origin=[0, 0, 0], SymInt key_stride=1, str kernel_name='') -> (Tensor out, Tensor "
      "logsumexp)");

  // Gradients of q, k, v, and of attn_mask if mask_grad, else an empty tensor.
  library.def(
      "partial_attention_backward(Tensor grad_out, Tensor? grad_logsumexp, Tensor q, Tensor k, Tensor v, "
      "Tensor out, "
      "Tensor logsumexp, bool mask_grad, Tensor? attn_mask=None, *, float? scale=None, SymInt? causal=None, "
      "SymInt? window=None, float softcap=0., float dropout_p=0., Tensor? seed=None, SymInt[] origin=[0, 0, "
      "0], SymInt key_stride=1, str kernel_name='') "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // Which elements dropout keeps: bool of `sizes` (b, h, l, s), whose element [0, 0, 0] is global `origin`
  // (batch, head, row).
  library.def("dropout_keep_mask(Tensor seed, float p, SymInt[] sizes, SymInt[] origin=[0, 0, 0]) -> Tensor");

  // Attention over all keys from attention over disjoint parts of them: (parts, B, H, L, Dv) and (parts, B,
  // H, L).
  library.def("merge_partials(Tensor outs, Tensor logsumexps) -> (Tensor out, Tensor logsumexp)");

  // 4-D tensors into one buffer (parts, N) and back; csrc/move/pack.h is the contract. Each is the other's
  // adjoint.
  library.def("pack(Tensor[] tensors, int[] dims, int parts, bool zigzag=False) -> Tensor");
  library.def("unpack(Tensor buffer, SymInt[] sizes, int[] dims, int parts, bool zigzag=False) -> Tensor[]");

  // Concatenation along dim over the group. Adjoint: reduce_scatter, since each rank uses the whole in its
  // own way.
  library.def("all_gather(Tensor x, int dim, int group_size, str group) -> Tensor", all_gather_op);

  // A rank's piece along dim of the sum over the group. Adjoint: all_gather.
  library.def("reduce_scatter(Tensor x, int dim, int group_size, str group) -> Tensor", reduce_scatter_op);

  // Pieces along split_dim are exchanged and concatenated along cat_dim. Adjoint: the same with the dims
  // swapped.
  library.def("all_to_all(Tensor x, int split_dim, int cat_dim, int group_size, str group) -> Tensor",
              all_to_all_op);

  // The sum over the group, used alike by every rank. Adjoint: identity.
  library.def("all_reduce(Tensor x, int group_size, str group) -> Tensor", all_reduce_op);

  // head_dim gathered over the head axis and slice_dim over the slice axis, head axis first unless
  // slices_first; grid is (n, m, i, j). replicated: every rank uses the whole alike, the adjoint is its own
  // block; else a reduce-scatter.
  library.def(
      "hierarchical_all_gather(Tensor x, int head_dim, int slice_dim, int[] grid, str slice_group, str "
      "head_group, "
      "bool slices_first=False, bool replicated=False) -> Tensor",
      hierarchical_all_gather_op);

  // First half of the pass: project, move. grid is (n, m, i, j); whole_heads: q_weight, q_bias and out_weight
  // are stored by whole heads, (H / m, d, D) and so on. position: of the first token, for scheme "position".
  library.def(
      "enter(Tensor query, Tensor key, Tensor value, Tensor q_weight, Tensor k_weight, Tensor v_weight, "
      "Tensor? q_bias, Tensor? k_bias, Tensor? v_bias, Tensor? bias_k, Tensor? bias_v, bool add_zero_attn, "
      "bool batch_first, bool causal, int[] grid, str slice_group, str head_group, str grid_group, str "
      "scheme, bool whole_heads, str combine, ScalarType? reduce_dtype, SymInt position=0) "
      "-> (Tensor, Tensor, Tensor)",
      enter_op);

  // Second half: attend, move back, combine. k and v as `enter` gave them, or those of a cache in the same
  // layout; causal counts positions, first_key is the position of the first key and of the mask's first
  // column.
  library.def(
      "leave(Tensor q, Tensor k, Tensor v, Tensor out_weight, Tensor? out_bias, Tensor? attn_mask, SymInt "
      "batch, "
      "SymInt length, float? scale, SymInt? causal, SymInt? window, float softcap, float dropout_p, Tensor? "
      "seed, "
      "bool batch_first, int[] grid, str slice_group, str head_group, str grid_group, str scheme, bool "
      "whole_heads, str combine, ScalarType? reduce_dtype, SymInt position=0, SymInt first_key=0) -> Tensor",
      leave_op);

  // The same and the attention weights, (B, h, L, S) or averaged over the heads (B, L, S).
  library.def(
      "leave_with_weights(Tensor q, Tensor k, Tensor v, Tensor out_weight, Tensor? out_bias, Tensor? "
      "attn_mask, "
      "SymInt batch, SymInt length, float? scale, SymInt? causal, SymInt? window, float softcap, float "
      "dropout_p, "
      "Tensor? seed, bool batch_first, int[] grid, str slice_group, str head_group, str grid_group, str "
      "scheme, bool whole_heads, str combine, ScalarType? reduce_dtype, SymInt position=0, SymInt "
      "first_key=0, "
      "bool average=True) -> (Tensor, Tensor)",
      leave_with_weights_op);

  // Tensors (B or 1, 1, L, ..) that go with tokens, such as rotary angles -> the rows of this rank's q, and
  // of its k.
  library.def(
      "deal_rows(Tensor[] xs, Tensor q, Tensor k, Tensor out_weight, SymInt batch, SymInt length, bool "
      "causal, "
      "int[] grid, str slice_group, str head_group, str grid_group, str scheme, bool whole_heads, str "
      "combine, "
      "SymInt position=0) -> (Tensor[] queries, Tensor[] keys)",
      deal_rows_op);

  // What needs d whole, between the halves. The first r dims of x (B, H, L, d) turned in pairs by the angles
  // of its tokens: cos, sin (B or 1, 1, L, r).
  library.def("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor", rotary);

  // RMS norm of every head: x (B, H, L, d), weight (d,).
  library.def("head_norm(Tensor x, Tensor weight, float eps) -> Tensor", head_norm);

  // Identity on tensors that are the same on every rank and are used differently by each. Adjoint: the sum
  // over the group, in one exchange.
  library.def("replicated(Tensor[] xs, int group_size, str group, ScalarType? reduce_dtype=None) -> Tensor[]",
              replicated_op);
}

}  // namespace two_level_mha
