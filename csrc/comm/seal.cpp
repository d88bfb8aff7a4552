#include "seal.h"

#include <ATen/Parallel.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>

#include "../base/arithmetic.h"
#include "../plan/grid.h"
#include "exchange.h"
#include "seal_units.h"

namespace two_level_mha {

namespace {

constexpr int64_t kLanes = 8;  // pairs of sums that a loop keeps apart
constexpr int64_t kBytesATask = 1 << 18;

uint64_t scrambled(uint64_t x) {
  x *= 0x9e3779b97f4a7c15;
  return x ^ (x >> 32);
}

// Of every lane the sum of its words and the sum of those sums: a changed bit shows, and so do swapped words.
uint64_t sum_of_words(const char* bytes, int64_t count) {
  std::array<uint64_t, kLanes> words, sums{}, sums_of_sums{};
  const int64_t whole = count - count % int64_t(sizeof words);
  int64_t at = 0;
  for (; at < whole; at += sizeof words) {
    std::memcpy(words.data(), bytes + at, sizeof words);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += words[lane] ^ (words[lane] >> 29);
      sums_of_sums[lane] += sums[lane];
    }
  }
  uint64_t state = count;
  for (int64_t lane = 0; lane < kLanes; ++lane)
    state = scrambled(scrambled(state ^ sums[lane]) ^ sums_of_sums[lane]);
  for (; at < count; ++at) state = scrambled(state ^ uint8_t(bytes[at]));
  return state;
}

class Hash {
 public:
  void mix(uint64_t x) {
    state_ = (state_ ^ x) * 0x9e3779b97f4a7c15;
    state_ ^= state_ >> 32;
  }

  void mix(const Tensor& x) {
    for (int64_t size : x.sizes()) mix(size);
    const Tensor part = once(x);
    const auto* bytes = static_cast<const char*>(part.const_data_ptr());
    const int64_t count = part.nbytes(), tasks = ceil_div(count, kBytesATask);
    std::vector<uint64_t> sums(tasks);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task * kBytesATask;
        sums[task] = sum_of_words(bytes + at, std::min(kBytesATask, count - at));
      }
    });
    for (uint64_t sum : sums) mix(sum);
  }

  int64_t value() const { return int64_t(state_ & 0x7fffffffffffffff); }

 private:
  uint64_t state_ = 0;
};

int64_t number_of(const Tensor& seal) {
  TORCH_CHECK_VALUE(seal.numel() == 1 && seal.scalar_type() == at::kLong && seal.is_cpu(),
                    "seal must be an int64 tensor of one element on the CPU");
  return seal.item<int64_t>();
}

bool alike(const Tensor& sums, int64_t ranks) {
  const SealCode code = code_of(sums.scalar_type(), ranks);
  TORCH_CHECK_VALUE(sums.numel() == code.elements(), "sums must have ", code.elements(), " elements, got ",
                    sums.numel());
  const Tensor exact = sums.to(at::kCPU, at::kDouble).contiguous();
  const double* sum = exact.const_data_ptr<double>();
  for (int64_t i = 0; i < code.digits(); ++i)
    if (!one_digit({sum[2 * i], sum[2 * i + 1]}, ranks, code.complement)) return false;
  return true;
}

// Empty, or which ranks had something else than most. A collective verdict, since all have these sums.
std::string difference(const Tensor& sums, const Seal& seal) {
  if (alike(sums, seal.grid.size)) return "";
  const Tensor all = run(Collective::all_gather, seal.hash.reshape({1, 1}), seal.grid).cpu();
  const int64_t* hashes = all.const_data_ptr<int64_t>();
  std::map<int64_t, int64_t> counts;
  for (int64_t rank = 0; rank < seal.grid.size; ++rank) ++counts[hashes[rank]];
  int64_t usual = hashes[0];
  for (const auto& [hash, count] : counts)
    if (count > counts[usual]) usual = hash;
  std::string odd;
  for (int64_t rank = 0; rank < seal.grid.size; ++rank)
    if (hashes[rank] != usual) odd += (odd.empty() ? "" : ", ") + std::to_string(rank);
  return "ranks of the grid differ in a call of " + (seal.grid.layer.empty() ? "a layer" : seal.grid.layer) +
         ": rank " + odd +
         " has not the inputs, mask, options, layer or number of the call that the others have";
}

SealHandlers& handlers() {
  static auto* kept = new SealHandlers;  // never destroyed, as threads may outlive it
  return *kept;
}

// Whether what the sums say is left in a verdict, for later.
bool left_for_later(const Tensor& sums, const Seal& seal) {
  const SealHandlers& ask = handlers();
  if (!ask.expect) return false;
  const auto verdict = ask.expect(seal.grid.name, seal.grid.layer, sums.device());
  if (!verdict) return false;
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("two_level_mha::seal_verdict", "")
                       .typed<void(const Tensor&, const Tensor&, int64_t, const Tensor&)>();
  op.call(sums, seal.hash, seal.grid.size, *verdict);
  ask.sent(seal.grid.name, sums.device());
  return true;
}

// Raises where ranks differ, or leaves that for later.
void settle(const Tensor& sums, const Seal& seal, bool compiled) {
  if (left_for_later(sums, seal)) return;
  if (compiled && !sums.is_cpu())
    return;  // the capture of a CUDA graph must not wait, and nobody looks later
  const std::string text = difference(sums, seal);
  if (!text.empty() && compiled && handlers().differ) handlers().differ(text);
  TORCH_CHECK_WITH(DistError, text.empty(), text);
}

Tensor hash_cpu(at::TensorList xs, at::IntArrayRef numbers, std::string text,
                const std::optional<Tensor>& before) {
  Hash hash;
  if (before) hash.mix(uint64_t(number_of(*before)));
  hash.mix(hash_of(numbers, text));
  for (const Tensor& x : xs) {
    TORCH_CHECK_VALUE(x.is_cpu() && x.layout() == at::kStrided, "xs must be strided tensors on the CPU");
    hash.mix(x);
  }
  return at::scalar_tensor(hash.value(), at::kLong);
}

Tensor hash_meta(at::TensorList xs, c10::SymIntArrayRef, std::string, const std::optional<Tensor>& before) {
  const at::Device device = before ? before->device() : xs.empty() ? at::Device(at::kMeta) : xs[0].device();
  return at::empty({}, at::TensorOptions(at::kLong).device(device));
}

Tensor digits_cpu(const Tensor& hash, at::ScalarType dtype, int64_t ranks) {
  const SealCode code = code_of(dtype, ranks);
  const int64_t bits = number_of(hash);
  Tensor digits = at::empty({code.elements()}, at::kDouble);
  double* to = digits.mutable_data_ptr<double>();
  for (int64_t i = 0; i < code.digits(); ++i) {
    const DigitPair pair = digit_pair(bits, i, code.bits, code.complement);
    to[2 * i] = pair.first, to[2 * i + 1] = pair.second;
  }
  return digits.to(dtype);
}

Tensor digits_meta(const Tensor& hash, at::ScalarType dtype, int64_t ranks) {
  return at::empty({code_of(dtype, ranks).elements()}, hash.options().dtype(dtype));
}

void verdict_cpu(const Tensor& sums, const Tensor& hash, int64_t ranks, const Tensor& verdict) {
  check_verdict(sums, hash, verdict, ranks);
  verdict.select(0, 1).fill_(number_of(hash));
  if (!alike(sums, ranks)) verdict.select(0, 0).fill_(1);
}

void verdict_meta(const Tensor&, const Tensor&, int64_t, const Tensor&) {}

// A copy, since a graph has no other way to say that y is what was checked.
Tensor opened_op(const Tensor& y, const Tensor& sums, const Tensor& hash, int64_t ranks, std::string group,
                 std::string layer) {
  if (sums.is_cpu()) number_of(hash);
  settle(sums, {hash, {group, ranks, 0, layer, "grid"}}, /*compiled=*/true);
  return y.clone();
}

Tensor opened_meta(const Tensor& y, const Tensor&, const Tensor&, int64_t, std::string, std::string) {
  return at::empty_like(y);
}

}  // namespace

SealCode code_of(at::ScalarType dtype, int64_t ranks) {
  TORCH_CHECK_VALUE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "digits must be float64, float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(ranks >= 1 && ranks <= kMaxRanks, "group_size must be positive, at most ", kMaxRanks,
                    ", got ", ranks);
  return seal_code(int64_t(c10::elementSize(dtype)), ranks);
}

uint64_t hash_of(at::IntArrayRef numbers, const std::string& text) {
  Hash hash;
  for (int64_t number : numbers) hash.mix(uint64_t(number));
  hash.mix(sum_of_words(text.data(), text.size()));
  return uint64_t(hash.value());
}

Tensor once(const Tensor& x) {
  Tensor part = x.detach();
  for (int64_t dim = 0; dim < x.dim(); ++dim)
    if (x.stride(dim) == 0 && x.size(dim) > 1) part = part.narrow(dim, 0, 1);
  return part.contiguous();
}

void check_verdict(const Tensor& sums, const Tensor& hash, const Tensor& verdict, int64_t ranks) {
  const int64_t elements = code_of(sums.scalar_type(), ranks).elements();
  TORCH_CHECK_VALUE(sums.numel() == elements, "sums must have ", elements, " elements, got ", sums.numel());
  TORCH_CHECK_VALUE(hash.numel() == 1 && hash.scalar_type() == at::kLong && hash.device() == sums.device(),
                    "seal must be an int64 of one element on the device of sums");
  TORCH_CHECK_VALUE(verdict.is_cpu() && verdict.scalar_type() == at::kLong && verdict.dim() == 1 &&
                        verdict.numel() == 2 && verdict.is_contiguous() &&
                        (sums.is_cpu() || verdict.is_pinned()),
                    "verdict must be two int64 on the CPU, in pinned memory where sums are on a GPU");
}

void Facts::add(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  add(bits);
}

void Facts::add(const Tensor& x) {
  add(x.scalar_type());
  add(x.requires_grad());
  add(x.dim());
  tensors_.push_back(x);
}

Tensor Facts::hash(const std::optional<Tensor>& before) const {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("two_level_mha::seal", "")
          .typed<Tensor(at::TensorList, c10::SymIntArrayRef, std::string, const std::optional<Tensor>&)>();
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(tensors_, numbers_, text_, before);
}

Tensor digits_of(const Seal& seal, const Tensor& x) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("two_level_mha::seal_digits", "")
                       .typed<Tensor(const Tensor&, at::ScalarType, int64_t)>();
  return op.call(seal.hash, x.scalar_type(), seal.grid.size);
}

Tensor with_digits(const Tensor& x, const Tensor& digits) {
  return at::cat({x.reshape(-1), digits});
}

Tensor opened(const Tensor& y, const Tensor& sums, const Seal& seal) {
  static auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("two_level_mha::opened", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, int64_t, std::string, std::string)>();
  if (at::isTensorSubclassLike(y))  // of a graph that is traced
    return op.call(y, sums, seal.hash, seal.grid.size, seal.grid.name, seal.grid.layer);
  settle(sums, seal, /*compiled=*/false);
  return y;
}

void set_seal_handlers(SealHandlers given) {
  handlers() = std::move(given);
}

TORCH_LIBRARY_IMPL(two_level_mha, CPU, library) {
  library.impl("seal", hash_cpu);
  library.impl("seal_digits", digits_cpu);
  library.impl("seal_verdict", verdict_cpu);
  library.impl("opened", opened_op);
}

TORCH_LIBRARY_IMPL(two_level_mha, CUDA, library) {
  library.impl("opened", opened_op);
}

TORCH_LIBRARY_IMPL(two_level_mha, Meta, library) {
  library.impl("seal", hash_meta);
  library.impl("seal_digits", digits_meta);
  library.impl("seal_verdict", verdict_meta);
  library.impl("opened", opened_meta);
}

}  // namespace two_level_mha
