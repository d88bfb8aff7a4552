// The Python module `_C`: what Python asks of C++ besides the operators, which are reached through torch.ops.
#include <pybind11/stl.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <array>
#include <map>
#include <string>

#include "attend/kernels_python.h"
#include "comm/progress.h"
#include "comm/seal.h"
#include "pass/cache.h"
#include "pass/context.h"
#include "plan/options.h"

namespace {

using namespace two_level_mha;
using namespace pybind11::literals;

using Call = CallSizes<int64_t>;

std::map<std::string, std::string> build_info() {
#ifdef TLM_WITH_CUDA
  const char* cuda = "yes";
#else
  const char* cuda = "no";
#endif
  return {{"torch", TORCH_VERSION}, {"cuda", cuda}, {"archs", TLM_ARCHS}, {"compiler", __VERSION__}};
}

std::string grid_problem(int64_t n, int64_t m, int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return Grid{n, m}.problem({heads, kv_heads, head_dim});
}

std::vector<std::pair<int64_t, int64_t>> ranked(int64_t ranks, int64_t heads, int64_t kv_heads,
                                                int64_t head_dim, const Rates::Numbers& profile) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const Grid& grid : ranked_grids(ranks, {heads, kv_heads, head_dim}, Rates::from_numbers(profile)))
    found.emplace_back(grid.head_groups, grid.slices);
  return found;
}

bool has_grid(int64_t ranks, int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return !Grid::valid_grids(ranks, {heads, kv_heads, head_dim}).empty();
}

std::string grid_choices(int64_t ranks, int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return Grid::choices(ranks, {heads, kv_heads, head_dim});
}

std::vector<std::tuple<std::string, bool, std::string>> schemes() {
  constexpr const char* kStorages[] = {"slices", "whole heads", "either"};
  std::vector<std::tuple<std::string, bool, std::string>> rows;
  for (const SchemeRow& row : kSchemes) rows.emplace_back(row.name, row.exact, kStorages[int(row.storage)]);
  return rows;
}

void check_positive(const std::map<std::string, int64_t>& numbers) {
  for (const auto& [name, number] : numbers)
    TORCH_CHECK_VALUE(number >= 1, name, " must be positive, got ", number);
}

void check_overlap(int64_t overlap) {
  TORCH_CHECK_VALUE(0 <= overlap && overlap <= kMostChunks, "overlap must be from 0 to ", kMostChunks,
                    ", got ", overlap);
}

void check_call(const Call& call) {
  check_positive({{"H", call.H}, {"K", call.K}, {"d", call.d}, {"m", call.m}, {"n", call.n}});
  TORCH_CHECK_VALUE(call.n <= kMaxRanks / call.m, "n * m must be at most ", kMaxRanks, ", got ",
                    Grid{call.n, call.m}.text());
  check_overlap(call.overlap);
}

std::string resolve(const std::string& scheme, Call call, const Rates::Numbers& profile) {
  check_call(call);
  const Rates rates = Rates::from_numbers(profile);
  call.node = rates.node;
  return scheme_row(resolve_scheme(scheme_from_name(scheme), call, rates)).name;
}

std::vector<int64_t> split_sizes(int64_t size, int64_t n, int64_t m, bool rows) {
  check_place({n, m}, 0, 0);
  TORCH_CHECK_VALUE(size >= 0, "size must not be negative, got ", size);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      const Split split({}, n, m, i, j, rows ? Activations::sequence : Activations::batch);
      sizes.push_back(split.own(size).guard_int(__FILE__, __LINE__));
    }
  return sizes;
}

// (layer, exchange, backward, waiting)
std::tuple<std::string, std::string, bool, bool> progress_tuple() {
  const Progress now = progress();
  return {now.layer, now.exchange, now.backward, now.waiting};
}

// handler(group name, error text) -> the exception to raise in place of the error, or None. The handler lives on
// when the interpreter ends.
void set_python_failure_handler(py::function handler) {
  auto* kept = new py::function(std::move(handler));
  set_failure_handler([kept](const std::string& group, const std::string& error) {
    py::gil_scoped_acquire gil;
    const py::object raised = (*kept)(group, error);
    if (raised.is_none()) return;
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised.ptr())), raised.ptr());
    throw py::error_already_set();
  });
}

// differ(text) -> the exception to raise; expect(group, layer, device) -> a tensor or None; sent(group, device).
void set_python_seal_handlers(py::function differ, py::function expect, py::function sent) {
  auto* kept = new std::array<py::function, 3>{std::move(differ), std::move(expect), std::move(sent)};
  SealHandlers handlers;
  handlers.differ = [kept](const std::string& text) {
    py::gil_scoped_acquire gil;
    const py::object raised = (*kept)[0](text);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(raised.ptr())), raised.ptr());
    throw py::error_already_set();
  };
  handlers.expect = [kept](const std::string& group, const std::string& layer, at::Device device) {
    py::gil_scoped_acquire gil;
    return (*kept)[1](group, layer, device).cast<std::optional<at::Tensor>>();
  };
  handlers.sent = [kept](const std::string& group, at::Device device) {
    py::gil_scoped_acquire gil;
    (*kept)[2](group, device);
  };
  set_seal_handlers(std::move(handlers));
}

template <class I>
py::list rows_of(const Traffic<I>& traffic) {
  constexpr const char* kAxes[] = {"slice", "head", "grid"};
  py::list rows;
  for (const auto& row : traffic)
    rows.append(py::dict("what"_a = row.what, "axis"_a = kAxes[int(row.axis)], "bytes"_a = int64_t(row.bytes),
                         "bias_bytes"_a = row.biases, "collectives"_a = row.collectives));
  return rows;
}

py::dict traffic_of(const std::string& scheme, const Call& call) {
  check_call(call);
  const Scheme found = scheme_from_name(scheme);
  return py::dict("forward"_a = rows_of(forward_traffic(found, call)),
                  "backward"_a = rows_of(backward_traffic(found, call)));
}

std::vector<std::tuple<std::string, std::string, Rates::Numbers, std::string>> profile_table() {
  std::vector<std::tuple<std::string, std::string, Rates::Numbers, std::string>> rows;
  for (const auto& [name, device, rates, source] : kProfiles)
    rows.emplace_back(name, device, rates.numbers(), source);
  return rows;
}

py::dict seconds_of(const Price<Checked>& price, const Rates& rates) {
  auto seconds = [&](Checked flops) { return double(flops) / double(rates.flops); };
  return py::dict("compute"_a = seconds(price.compute), "memory"_a = seconds(price.memory),
                  "sending"_a = seconds(price.sending), "latency"_a = seconds(price.latency),
                  "hidden"_a = seconds(price.hidden), "total"_a = seconds(price.total()));
}

py::dict option_dict(const Option& option, const Rates& rates) {
  return py::dict("grid"_a = py::make_tuple(option.grid.head_groups, option.grid.slices),
                  "scheme"_a = scheme_row(option.scheme).name, "whole_heads"_a = option.sizes.whole_heads,
                  "exact"_a = option.exact, "auto"_a = option.automatic, "overlap"_a = option.sizes.overlap,
                  "attention_flops"_a = int64_t(option.work.attention),
                  "projection_flops"_a = int64_t(option.work.projections),
                  "forward"_a = rows_of(option.forward), "backward"_a = rows_of(option.backward),
                  "weight_bytes"_a = int64_t(option.memory.weights),
                  "activation_bytes"_a = int64_t(option.memory.activations),
                  "cache_bytes"_a = int64_t(option.memory.cache),
                  "predicted_seconds"_a = seconds_of(option.price, rates));
}

// (options, index of the pick)
std::pair<py::list, int64_t> plan(int64_t ranks, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                  int64_t embed_dim, int64_t B, int64_t L, int64_t S, int64_t element_size,
                                  bool cached, bool causal, bool concat, bool bias, bool gated,
                                  int64_t activations, int64_t overlap, const std::array<int64_t, 5>& latent,
                                  const std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>>& shares,
                                  const Rates::Numbers& profile) {
  const Rates rates = Rates::from_numbers(profile);
  PlanRequest request{ranks, {{heads, kv_heads, head_dim}, embed_dim}, {B, L, S}, cached};
  request.layer.bias = request.layer.out_bias = bias;
  request.layer.concat = concat;
  request.layer.gated = gated;
  const auto [rank, nope, rope, value, query_rank] = latent;
  request.layer.latent = {rank, nope, rope, value, query_rank};
  if (rank > 0) {
    request.layer.bias = false;
    request.layer.out_dim = embed_dim;
    request.layer.key_dim = request.layer.value_dim = rank;
    if (query_rank > 0) request.layer.D = query_rank;
  }
  if (activations < 0 || activations > int64_t(Activations::batch))
    throw std::invalid_argument("activations must be 0, 1 or 2");
  request.layer.activations = Activations(activations);
  check_overlap(overlap);
  request.layer.overlap = overlap;
  request.call.position = cached ? S - L : 0;
  request.call.in_halves = cached;
  for (const auto& [grid, of_ranks] : shares) request.cycles[grid] = cycle_of(of_ranks);
  request.call.element_size = element_size;
  request.call.causal = causal;
  const auto options = plan_options(request, rates);
  py::list found;
  for (const Option& option : options) found.append(option_dict(option, rates));
  return {found, pick(options)};
}

bool stores_whole(int64_t heads, int64_t kv_heads, int64_t n, int64_t m) {
  check_positive(
      {{"heads", heads}, {"n", n}, {"m", m}, {"kv_heads / n", kv_heads / std::max<int64_t>(n, 1)}});
  return stores_whole_heads({heads, kv_heads, 1}, {n, m});
}

bool whole_fit(int64_t heads, int64_t kv_heads, int64_t m) {
  check_positive({{"H", heads}, {"K", kv_heads}, {"m", m}});
  return whole_heads_fit(heads, kv_heads, m);
}

template <class Fields>
std::vector<std::string> names_of(const Fields& fields) {
  std::vector<std::string> names;
  for (const auto& field : fields) names.emplace_back(field.name);
  return names;
}

std::map<std::string, int64_t> scheme_numbers() {
  std::map<std::string, int64_t> numbers{{"auto", int64_t(Scheme::automatic)}};
  for (const SchemeRow& row : kSchemes) numbers[row.name] = int64_t(row.scheme);
  return numbers;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What was compiled in: torch (version), cuda (yes or no), archs (GPU architectures), compiler.");
  m.def("progress", &progress_tuple, "Where this process is: (layer, exchange, backward, whether it waits).");
  m.def("set_failure_handler", &set_python_failure_handler,
        "handler(group name, error text), called when an exchange fails: the exception to raise, or None.");
  m.def("set_seal_handlers", &set_python_seal_handlers,
        "What compiled calls ask for where ranks compare them: differ(text), the exception to raise; "
        "expect(group name, "
        "layer, device), where the verdict goes, or None, where the call is to wait; sent(group name, "
        "device), after it.");
  m.def("grid_problem", &grid_problem,
        "Empty if the grid fits, else the rule that broke and the grids that would do.");
  m.def("split_sizes", &split_sizes,
        "What each rank of an (n, m) grid has of a number of rows, or else of sequences, in the order of "
        "ranks.");
  m.def("has_grid", &has_grid, "Whether a number of ranks has a valid grid.");
  m.def("ranked_grids", &ranked, "Valid (n, m) for a number of ranks, the fastest in a typical call first.");
  m.def("grid_choices", &grid_choices, "A sentence with the valid grids for a number of ranks, and near it.");
  m.attr("most_chunks") = kMostChunks;
  m.attr("most_shares") = kMostShares;
  m.def("schemes", &schemes, "(name, exact, storage) of every scheme.");
  m.def(
      "constant_fields", [] { return names_of(kConstants); }, "Names of the constants of a call, in order.");
  m.def(
      "size_fields", [] { return names_of(kSizes); }, "Names of the sizes of a call, in order.");
  m.def(
      "cache_fields", [] { return names_of(kCacheFields); }, "Names of a cache layer's numbers, in order.");
  m.def("scheme_numbers", &scheme_numbers, "The number of every scheme, and of \"auto\".");
  m.def(
      "scalar_type", [](at::ScalarType type) { return int64_t(type); }, "The number of a dtype.");
  m.def("whole_heads_fit", &whole_fit, "Whether H query and K KV heads can be stored as whole heads on m.");
  m.def("stores_whole_heads", &stores_whole,
        "Whether scheme='auto' stores h query and k KV heads as whole heads on a grid (n, m).");
  m.def("resolve_scheme", &resolve, "The scheme that scheme='auto' takes for a call.");
  m.def("traffic", &traffic_of, "What one rank sends in a call, forward and backward, exchange by exchange.");
  m.def("profiles", &profile_table,
        "(name, device, numbers, source) of every known profile; numbers as in csrc/plan/profiles.h.");
  m.def("plan", &plan, "Every valid grid with every scheme, and the index of the pick.", py::kw_only(),
        "ranks"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "embed_dim"_a, "B"_a, "L"_a, "S"_a,
        "element_size"_a, "cached"_a, "causal"_a, "concat"_a, "bias"_a, "gated"_a, "activations"_a,
        "overlap"_a, "latent"_a, "shares"_a, "profile"_a);

  bind_kernels(m);

  // csrc/schemes.h says what the fields mean
  py::class_<Call>(m, "Call")
      .def(py::init([](int64_t B, int64_t L, int64_t S, int64_t H, int64_t K, int64_t d, int64_t m) {
             return Call{B, L, S, H, K, d, m};
           }),
           py::kw_only(), "B"_a, "L"_a, "S"_a, "H"_a, "K"_a, "d"_a, "m"_a)
      .def_readwrite("n", &Call::n)
      .def_readwrite("D", &Call::D)
      .def_readwrite("element_size", &Call::element_size)
      .def_readwrite("causal", &Call::causal)
      .def_readwrite("concat", &Call::concat)
      .def_readwrite("whole_heads", &Call::whole_heads)
      .def_readwrite("gated", &Call::gated)
      .def_readwrite("position", &Call::position)
      .def_property(
          "cycle",
          [](const Call& call) {
            return std::array<int64_t, 2>{call.cycle.length, call.cycle.most};
          },
          [](Call& call, const std::array<int64_t, 2>& sizes) {
            call.cycle = {sizes[0], sizes[1]};
          })
      .def_readwrite("reduce_size", &Call::reduce_size)
      .def_readwrite("key_dim", &Call::key_dim)
      .def_readwrite("value_dim", &Call::value_dim)
      .def_readwrite("out_dim", &Call::out_dim)
      .def_property(
          "latent",
          [](const Call& call) {
            const auto& [rank, nope, rope, value, query_rank] = call.latent;
            return std::array<int64_t, 5>{rank, nope, rope, value, query_rank};
          },
          [](Call& call, const std::array<int64_t, 5>& sizes) {
            call.latent = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
          })
      .def_readwrite("inputs", &Call::inputs)
      .def_readwrite("extra_keys", &Call::extra_keys)
      .def_readwrite("bias", &Call::bias)
      .def_readwrite("out_bias", &Call::out_bias)
      .def_readwrite("bias_kv", &Call::bias_kv)
      .def_readwrite("node", &Call::node)
      .def_property(
          "activations", [](const Call& call) { return int64_t(call.activations); },
          [](Call& call, int64_t number) { call.activations = Activations(number); })
      .def_readwrite("overlap", &Call::overlap)
      .def_readwrite("attention_weights", &Call::attention_weights)
      .def_readwrite("mask_elements", &Call::mask_elements)
      .def_readwrite("training", &Call::training)
      .def_readwrite("sealed", &Call::sealed);
}
