#include "pairs.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

namespace two_level_mha {

namespace {

constexpr int kTag = 0x746c6d;  // of these messages, apart from those that others send in the group

// Messages under way. Alone they would wait as long as Gloo's connections were first told, whatever set_timeout says.
class Messages : public c10d::Work {
 public:
  explicit Messages(std::chrono::milliseconds limit) : limit_(limit) {}

  void push_back(c10::intrusive_ptr<c10d::Work> one) { works_.push_back(std::move(one)); }

  bool wait(std::chrono::milliseconds limit = kNoTimeout) override {
    using Clock = std::chrono::steady_clock;
    const auto until = Clock::now() + (limit == kNoTimeout ? limit_ : limit);
    for (const auto& work : works_) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now());
      work->wait(std::max(left, std::chrono::milliseconds(1)));
    }
    return true;
  }

 private:
  std::chrono::milliseconds limit_;
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

// Gloo's backend of the group for CPU tensors; empty if it has another, or if there is no such group.
c10::intrusive_ptr<c10d::Backend> gloo_of(const std::string& name) {
  try {
    auto backend = c10d::resolve_process_group(name)->getBackend(c10::kCPU);
    return backend->getBackendName() == "gloo" ? backend : nullptr;
  } catch (const c10::Error&) {
    return nullptr;
  }
}

// Piece k of `theirs` comes from rank k, piece k of `ours` goes there. Pieces without elements do not travel.
c10::intrusive_ptr<Messages> post(c10d::Backend& gloo, const std::vector<Tensor>& theirs,
                                  const std::vector<Tensor>& ours) {
  const int size = gloo.getSize(), rank = gloo.getRank();
  auto works = c10::make_intrusive<Messages>(gloo.getBackendOptions()->timeout);
  for (int k = 1; k < size; ++k) {
    const int from = (rank + size - k) % size;
    std::vector<Tensor> piece{theirs[from]};
    if (piece[0].numel() > 0) works->push_back(gloo.recv(piece, from, kTag));
  }
  for (int k = 1; k < size; ++k) {
    const int to = (rank + k) % size;
    std::vector<Tensor> piece{ours[to]};
    if (piece[0].numel() > 0) works->push_back(gloo.send(piece, to, kTag));
  }
  Tensor(theirs[rank]).copy_(ours[rank]);
  return works;
}

// Waited for at once, or by whoever waits for the tensor: a graph may write to x again before it does.
Tensor with_messages(const Tensor& out, const c10::intrusive_ptr<Messages>& messages, bool wait) {
  if (wait)
    messages->wait();
  else
    c10d::register_work(out, messages);
  return out;
}

c10::intrusive_ptr<c10d::Backend> checked_gloo(const std::string& name) {
  auto gloo = gloo_of(name);
  TORCH_CHECK_VALUE(gloo != nullptr, "group_name must be a group with Gloo for CPU tensors, got ", name);
  return gloo;
}

void check_sizes(const char* name, at::IntArrayRef sizes, int64_t ranks) {
  TORCH_CHECK_VALUE(int64_t(sizes.size()) == ranks, name, " must have one number for each of ", ranks,
                    " ranks, got ", sizes);
  for (int64_t size : sizes) TORCH_CHECK_VALUE(size >= 0, name, " must not be negative, got ", sizes);
}

Tensor all_to_all_cpu(const Tensor& x, at::IntArrayRef received, at::IntArrayRef sent, std::string group,
                      bool wait) {
  auto gloo = checked_gloo(group);
  check_sizes("output_split_sizes", received, gloo->getSize());
  check_sizes("input_split_sizes", sent, gloo->getSize());
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(0) == c10::sum_integers(sent),
                    "input_split_sizes must sum to the rows of input ", x.sizes(), ", got ", sent);
  const size_t own = gloo->getRank();
  TORCH_CHECK_VALUE(sent[own] == received[own], "a rank receives from itself what it sends there: got ",
                    sent[own], " rows sent and ", received[own], " received");
  auto sizes = x.sizes().vec();
  sizes[0] = c10::sum_integers(received);
  Tensor out = at::empty(sizes, x.options());
  return with_messages(
      out, post(*gloo, out.split_with_sizes(received), x.contiguous().split_with_sizes(sent)), wait);
}

Tensor all_to_all_meta(const Tensor& x, c10::SymIntArrayRef received, c10::SymIntArrayRef, std::string,
                       bool) {
  auto sizes = x.sym_sizes().vec();
  sizes[0] = 0;
  for (const c10::SymInt& size : received) sizes[0] += size;
  return at::empty_symint(sizes, x.options());
}

Tensor all_gather_cpu(const Tensor& x, int64_t ranks, std::string group, bool wait) {
  auto gloo = checked_gloo(group);
  TORCH_CHECK_VALUE(ranks == gloo->getSize(), "group_size must be the ", gloo->getSize(),
                    " ranks of the group, got ", ranks);
  TORCH_CHECK_VALUE(x.dim() > 0, "input must have a dim, got a number");
  auto sizes = x.sizes().vec();
  const int64_t rows = sizes[0];
  sizes[0] *= ranks;
  Tensor out = at::empty(sizes, x.options());
  const std::vector<int64_t> of_each(ranks, rows);
  return with_messages(out, post(*gloo, out.split_with_sizes(of_each), std::vector(ranks, x.contiguous())),
                       wait);
}

Tensor all_gather_meta(const Tensor& x, int64_t ranks, std::string, bool) {
  auto sizes = x.sym_sizes().vec();
  sizes[0] *= ranks;
  return at::empty_symint(sizes, x.options());
}

}  // namespace

bool has_pairs(const Tensor& x, const Group& group) {
  return x.is_cpu() && gloo_of(group.name);
}

TORCH_LIBRARY_IMPL(two_level_mha, CPU, library) {
  library.impl("_all_to_all_pairs", all_to_all_cpu);
  library.impl("_all_gather_pairs", all_gather_cpu);
}

TORCH_LIBRARY_IMPL(two_level_mha, Meta, library) {
  library.impl("_all_to_all_pairs", all_to_all_meta);
  library.impl("_all_gather_pairs", all_gather_meta);
}

}  // namespace two_level_mha
