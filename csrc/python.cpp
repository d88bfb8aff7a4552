// The Python module `_C`: what Python asks of C++ besides the operators, which are reached through torch.ops.
#include <pybind11/stl.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "grid.h"
#include "schemes.h"

namespace {

using namespace two_level_mha;

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

std::vector<std::pair<int64_t, int64_t>> grid_candidates(int64_t ranks, int64_t heads, int64_t kv_heads,
                                                         int64_t head_dim) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const Grid& grid : Grid::candidates(ranks, {heads, kv_heads, head_dim}))
    found.emplace_back(grid.head_groups, grid.slices);
  return found;
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

std::string resolve(const std::string& scheme, int64_t B, int64_t L, int64_t S, int64_t H, int64_t K,
                    int64_t d, int64_t m, int64_t element_size, bool cuda) {
  CallSizes<int64_t> sizes{B, L, S, H, K, d, m};
  return scheme_row(resolve_scheme(scheme_from_name(scheme), sizes, element_size, profile_for(cuda))).name;
}

std::tuple<int64_t, int64_t, int64_t> cost(const std::string& scheme, int64_t B, int64_t L, int64_t S,
                                           int64_t H, int64_t K, int64_t d, int64_t m, bool causal) {
  CallSizes<int64_t> sizes{B, L, S, H, K, d, m};
  auto found = scheme_cost(scheme_from_name(scheme), sizes, causal);
  return {found.flops, found.elements, found.collectives};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What was compiled in: torch (version), cuda (yes or no), archs (GPU architectures), compiler.");
  m.def("grid_problem", &grid_problem,
        "Empty if the grid fits, else the rule that broke and the grids that would do.");
  m.def("grid_candidates", &grid_candidates, "Valid (n, m) for a number of ranks.");
  m.def("grid_choices", &grid_choices, "A sentence with the valid grids for a number of ranks, and near it.");
  m.def("schemes", &schemes, "(name, exact, storage) of every scheme.");
  m.def("whole_heads_fit", &whole_heads_fit,
        "Whether H query and K KV heads can be stored as whole heads on m.");
  m.def("resolve_scheme", &resolve, "The scheme that scheme='auto' takes for a call of these sizes.");
  m.def("scheme_cost", &cost, "(FLOPs, elements sent, collectives) of a scheme's forward, per rank.");
}
