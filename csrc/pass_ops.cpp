// The ops of the pass and of its cache, each a composition of others: its schema, with a comment.
//
// Letters: as in ops.cpp.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "ops.h"

namespace two_level_mha {

namespace {

using Tensors = std::vector<Tensor>;

// seal: what the ranks compare, as far as it is known.
Context sealed_context(const std::string& constants, c10::SymIntArrayRef sizes,
                       const std::optional<Tensor>& seal) {
  Context context = context_of(constants, sizes);
  if (seal && context.grid.size() > 1) context.seal = Seal{*seal, context.groups.grid};
  return context;
}

Tensors enter_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& q_weight,
                 const Tensor& k_weight, const Tensor& v_weight, const std::optional<Tensor>& q_bias,
                 const std::optional<Tensor>& k_bias, const std::optional<Tensor>& v_bias,
                 const std::optional<Tensor>& bias_k, const std::optional<Tensor>& bias_v,
                 std::optional<Tensors> rows, std::optional<Tensors> shared, std::string constants,
                 c10::SymIntArrayRef sizes, const std::optional<Tensor>& before) {
  const Context context = sealed_context(constants, sizes, before);
  const Entered entered = enter(query, key, value, {q_weight, k_weight, v_weight, q_bias, k_bias, v_bias},
                                {bias_k, bias_v, context.zero_key}, rows.value_or(Tensors()),
                                shared.value_or(Tensors()), context);
  Tensors all{entered.q, entered.k, entered.v};
  for (const Tensors* more : {&entered.q_rows, &entered.k_rows, &entered.shared})
    all.insert(all.end(), more->begin(), more->end());
  if (entered.seal) all.push_back(*entered.seal);
  return all;
}

Tensor leave_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_weight,
                const std::optional<Tensor>& out_bias, const std::optional<Tensor>& attn_mask,
                std::optional<double> scale, std::optional<c10::SymInt> causal,
                std::optional<c10::SymInt> window, double softcap, double dropout_p,
                const std::optional<Tensor>& seed, std::string constants, c10::SymIntArrayRef sizes,
                const std::optional<Tensor>& seal, const std::optional<Tensors>& after,
                const std::optional<Tensor>& scores) {
  const Context context = sealed_context(constants, sizes, seal);
  return leave(q, k, v, {attn_mask, scale, causal, window, softcap, dropout_p, seed}, scores,
               {out_weight, out_bias}, after_of(after, context), context);
}

Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& q_weight,
                    const Tensor& k_weight, const Tensor& v_weight, const std::optional<Tensor>& q_bias,
                    const std::optional<Tensor>& k_bias, const std::optional<Tensor>& v_bias,
                    const std::optional<Tensor>& bias_k, const std::optional<Tensor>& bias_v,
                    const Tensor& out_weight, const std::optional<Tensor>& out_bias,
                    std::optional<Tensors> angles, std::optional<Tensors> norms, double eps, bool interleaved,
                    const std::optional<Tensor>& attn_mask, std::optional<double> scale,
                    std::optional<c10::SymInt> causal, std::optional<c10::SymInt> window, double softcap,
                    double dropout_p, const std::optional<Tensor>& seed, std::string constants,
                    c10::SymIntArrayRef sizes, const std::optional<Tensor>& before) {
  const Context context = sealed_context(constants, sizes, before);
  return attention(query, key, value, {q_weight, k_weight, v_weight, q_bias, k_bias, v_bias},
                   {bias_k, bias_v, context.zero_key},
                   {norms.value_or(Tensors()), angles.value_or(Tensors()), eps, interleaved},
                   {attn_mask, scale, causal, window, softcap, dropout_p, seed}, {out_weight, out_bias},
                   context);
}

std::tuple<Tensor, Tensor> leave_with_weights_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_weight,
    const std::optional<Tensor>& out_bias, const std::optional<Tensor>& attn_mask,
    std::optional<double> scale, std::optional<c10::SymInt> causal, std::optional<c10::SymInt> window,
    double softcap, double dropout_p, const std::optional<Tensor>& seed, std::string constants,
    c10::SymIntArrayRef sizes, bool average, const std::optional<Tensor>& seal,
    const std::optional<Tensors>& after, const std::optional<Tensor>& scores) {
  const Context context = sealed_context(constants, sizes, seal);
  return leave_with_weights(q, k, v, {attn_mask, scale, causal, window, softcap, dropout_p, seed}, scores,
                            {out_weight, out_bias}, after_of(after, context), context, average);
}

std::tuple<Tensor, Tensors, std::vector<c10::SymInt>> leave_with_cache_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out_weight,
    const std::optional<Tensor>& out_bias, const std::optional<Tensor>& attn_mask,
    std::optional<double> scale, std::optional<c10::SymInt> causal, std::optional<c10::SymInt> window,
    double softcap, double dropout_p, const std::optional<Tensor>& seed, std::string constants,
    c10::SymIntArrayRef sizes, at::TensorList memory, c10::SymIntArrayRef cache,
    const std::optional<Tensor>& seal, const std::optional<Tensors>& after) {
  CacheLayer layer{parse("cache", kCacheFields, cache), memory.vec()};
  const Context context = sealed_context(constants, sizes, seal);
  Tensor y = leave(q, k, v, {attn_mask, scale, causal, window, softcap, dropout_p, seed}, std::nullopt,
                   {out_weight, out_bias}, after_of(after, context), context, &layer);
  return {y, layer.memory, list_of(kCacheFields, layer.numbers)};
}

std::tuple<Tensors, std::vector<c10::SymInt>, Tensor, Tensor> cache_append_op(
    at::TensorList memory, c10::SymIntArrayRef cache, const Tensor& k, const Tensor& v,
    const c10::SymInt& new_tokens, bool for_gradients) {
  CacheLayer layer{parse("cache", kCacheFields, cache), memory.vec()};
  auto [keys, values] = layer.append(k, v, new_tokens, for_gradients);
  return {layer.memory, list_of(kCacheFields, layer.numbers), keys, values};
}

std::tuple<Tensors, std::vector<c10::SymInt>> cache_select_op(at::TensorList memory,
                                                              c10::SymIntArrayRef cache, const Tensor& index,
                                                              std::string slice_group) {
  CacheLayer layer{parse("cache", kCacheFields, cache), memory.vec()};
  layer.select(index, slice_group);
  return {layer.memory, list_of(kCacheFields, layer.numbers)};
}

}  // namespace

// clang-format off
TORCH_LIBRARY_FRAGMENT(two_level_mha, library) {
  // First half of the pass: project, move. constants and sizes are what csrc/pass/context.h
  // makes its Context of. rows: tensors (B or 1, 1, L, ..) that go with tokens, such as rotary
  // angles. shared: parameters that every rank uses for its own rows and heads. -> q, k, v, the
  // rows of this rank's q, those of its k, and the shared ones, whose gradients are summed. If the
  // sizes have a number to compare, then last the seal for `leave`, which goes on from `before`.
  library.def(
      "enter("
      "Tensor query, "
      "Tensor key, "
      "Tensor value, "
      "Tensor q_weight, "
      "Tensor k_weight, "
      "Tensor v_weight, "
      "Tensor? q_bias, "
      "Tensor? k_bias, "
      "Tensor? v_bias, "
      "Tensor? bias_k, "
      "Tensor? bias_v, "
      "Tensor[]? rows, "
      "Tensor[]? shared, "
      "str constants, "
      "SymInt[] sizes, "
      "Tensor? before=None"
      ") -> Tensor[]",
      enter_op);

  // Second half: attend, move back, combine. k and v as `enter` gave them,
  // or those of a cache in the same layout; causal counts positions. after: the gate, which a gated
  // layer must have, whose q_weight has for each head two, q's and the gate's, then perhaps sinks
  // (h,): csrc/pass/after.h. scores: what is added to this rank's scores before the mask, broadcastable
  // to (B, H, L, S) of q and k.
  library.def(
      "leave("
      "Tensor q, "
      "Tensor k, "
      "Tensor v, "
      "Tensor out_weight, "
      "Tensor? out_bias, "
      "Tensor? attn_mask, "
      "float? scale, "
      "SymInt? causal, "
      "SymInt? window, "
      "float softcap, "
      "float dropout_p, "
      "Tensor? seed, "
      "str constants, "
      "SymInt[] sizes, "
      "Tensor? seal=None, "
      "Tensor[]? after=None, "
      "Tensor? scores=None"
      ") -> Tensor",
      leave_op);

  // Both halves, and between them norm_rotary with `norms` and the angles of q's tokens, if there are any. In chunks of
  // the batch all exchanges run beside attention, and not only those of one half beside what that half computes.
  library.def(
      "attention("
      "Tensor query, "
      "Tensor key, "
      "Tensor value, "
      "Tensor q_weight, "
      "Tensor k_weight, "
      "Tensor v_weight, "
      "Tensor? q_bias, "
      "Tensor? k_bias, "
      "Tensor? v_bias, "
      "Tensor? bias_k, "
      "Tensor? bias_v, "
      "Tensor out_weight, "
      "Tensor? out_bias, "
      "Tensor[]? angles, "
      "Tensor[]? norms, "
      "float eps, "
      "bool interleaved, "
      "Tensor? attn_mask, "
      "float? scale, "
      "SymInt? causal, "
      "SymInt? window, "
      "float softcap, "
      "float dropout_p, "
      "Tensor? seed, "
      "str constants, "
      "SymInt[] sizes, "
      "Tensor? before=None"
      ") -> Tensor",
      attention_op);

  // `leave`, and the attention weights, (B, h, L, S) or averaged over the heads (B, L, S).
  library.def(
      "leave_with_weights("
      "Tensor q, "
      "Tensor k, "
      "Tensor v, "
      "Tensor out_weight, "
      "Tensor? out_bias, "
      "Tensor? attn_mask, "
      "float? scale, "
      "SymInt? causal, "
      "SymInt? window, "
      "float softcap, "
      "float dropout_p, "
      "Tensor? seed, "
      "str constants, "
      "SymInt[] sizes, "
      "bool average=True, "
      "Tensor? seal=None, "
      "Tensor[]? after=None, "
      "Tensor? scores=None"
      ") -> (Tensor y, Tensor weights)",
      leave_with_weights_op);

  // `leave` with a layer of a KV cache, as `cache_append` has it:
  // it takes k and v first, and all of its own are attended to.
  library.def(
      "leave_with_cache("
      "Tensor q, "
      "Tensor k, "
      "Tensor v, "
      "Tensor out_weight, "
      "Tensor? out_bias, "
      "Tensor? attn_mask, "
      "float? scale, "
      "SymInt? causal, "
      "SymInt? window, "
      "float softcap, "
      "float dropout_p, "
      "Tensor? seed, "
      "str constants, "
      "SymInt[] sizes, "
      "Tensor[] memory, "
      "SymInt[] cache, "
      "Tensor? seal=None, "
      "Tensor[]? after=None"
      ") -> (Tensor y, Tensor[] memory, SymInt[] cache)",
      leave_with_cache_op);

  // A layer of a KV cache alone, csrc/pass/cache.h: its memory, which is written
  // in place where no graph needs it, and its numbers. Takes this rank's part of
  // new keys and values; gives its part of all that the call attends to.
  library.def(
      "cache_append("
      "Tensor[] memory, "
      "SymInt[] cache, "
      "Tensor k, "
      "Tensor v, "
      "SymInt new_tokens, "
      "bool for_gradients=False"
      ") -> (Tensor[] memory, SymInt[] cache, Tensor k, Tensor v)",
      cache_append_op);

  // Sequence b becomes what sequence index[b] was.
  library.def(
      "cache_select("
      "Tensor[] memory, "
      "SymInt[] cache, "
      "Tensor index, "
      "str slice_group"
      ") -> (Tensor[] memory, SymInt[] cache)",
      cache_select_op);
}
// clang-format on

}  // namespace two_level_mha
