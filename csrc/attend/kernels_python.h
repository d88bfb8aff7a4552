// kernels.h for Python: `_C.Request`, `_C.Machine`, `_C.kernels`, `_C.serving`, `_C.unusable`.
#pragma once

#include <c10/util/Exception.h>
#include <pybind11/stl.h>
#include <torch/extension.h>

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cpu/level.h"
#include "kernels.h"

namespace two_level_mha {

// The value of an enum by its name in a table of names.
template <class Enum, size_t kCount>
Enum named(const char* const (&names)[kCount], const std::string& name, const char* argument) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found != std::end(names)) return Enum(found - std::begin(names));
  std::string all;
  for (const char* one : names) all += (all.empty() ? "'" : ", '") + std::string(one) + "'";
  TORCH_CHECK_VALUE(false, argument, " must be one of ", all, ", got '", name, "'");
}

inline std::map<std::string, std::string> reasons_of(
    const std::function<std::string(const Kernel&)>& reason) {
  std::map<std::string, std::string> found;
  for (const Kernel& kernel : kKernels)
    if (std::string text = reason(kernel); !text.empty()) found[kernel.name] = text;
  return found;
}

inline void bind_kernels(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  constexpr const char* kDtypeNames[] = {"float64", "float32", "bfloat16", "float16"};
  constexpr const char* kMaskNames[] = {"", "bool", "additive"};
  const Machine gpu;  // for the defaults of its switches

  py::class_<Request>(m, "Request", "What a call of partial_attention needs; csrc/attend/request.h.")
      .def(py::init([=](const std::string& dtype, const std::string& mask, bool mask_rows,
                        std::optional<int64_t> causal, std::optional<int64_t> window, int64_t key_stride,
                        bool softcap, bool dropout, bool backward, bool grad_logsumexp, bool grad_mask) {
             TORCH_CHECK_VALUE(key_stride >= 1, "key_stride must be positive, got ", key_stride);
             Request r;
             r.dtype = named<Dtype>(kDtypeNames, dtype, "dtype");
             r.mask = named<MaskKind>(kMaskNames, mask, "mask");
             r.mask_rows = mask_rows;
             r.visible = {causal, window, key_stride};
             r.softcap = softcap, r.dropout = dropout;
             r.backward = backward, r.grad_logsumexp = grad_logsumexp, r.grad_mask = grad_mask;
             return r;
           }),
           py::kw_only(), "dtype"_a = "float32", "mask"_a = "", "mask_rows"_a = false,
           "causal"_a = std::nullopt, "window"_a = std::nullopt, "key_stride"_a = 1, "softcap"_a = false,
           "dropout"_a = false, "backward"_a = false, "grad_logsumexp"_a = false, "grad_mask"_a = false)
      .def_readwrite("B", &Request::B)
      .def_readwrite("H", &Request::H)
      .def_readwrite("K", &Request::K)
      .def_readwrite("L", &Request::L)
      .def_readwrite("S", &Request::S)
      .def_readwrite("d_qk", &Request::d_qk)
      .def_readwrite("d_v", &Request::d_v);

  py::class_<Machine>(m, "Machine", "What a call runs on; cpu: a level, '' for that of this CPU.")
      .def(
          py::init([=](bool cuda, const std::string& cpu, int arch, int64_t cudnn, bool cudnn_enabled,
                       bool flash_enabled, bool efficient_enabled, bool cudnn_backward, bool offset_windows) {
            const CpuLevel level = cpu.empty() ? cpu_level() : named<CpuLevel>(kCpuLevels, cpu, "cpu");
            return Machine{
                cuda,           level,         arch, cudnn, cudnn_enabled, flash_enabled, efficient_enabled,
                cudnn_backward, offset_windows};
          }),
          py::kw_only(), "cuda"_a = false, "cpu"_a = "", "arch"_a = gpu.arch, "cudnn"_a = gpu.cudnn,
          "cudnn_enabled"_a = gpu.cudnn_enabled, "flash_enabled"_a = gpu.flash_enabled,
          "efficient_enabled"_a = gpu.efficient_enabled, "cudnn_backward"_a = gpu.cudnn_backward,
          "offset_windows"_a = gpu.offset_windows)
      .def_property_readonly("cpu", [](const Machine& m) { return kCpuLevels[int(m.cpu)]; })
      .def("__str__", &machine_name);

  m.def(
      "kernels",
      [] {
        std::vector<py::dict> rows;
        for (const Kernel& kernel : kKernels)
          rows.push_back(py::dict("name"_a = kernel.name, "runs_on"_a = platform_name(kernel.platform),
                                  "supports"_a = feature_list(kernel.features)));
        return rows;
      },
      "Name, where it runs and what it supports of every attention kernel, the preferred ones first.");
  m.def(
      "serving",
      [](const Request& r, const Machine& machine) {
        return std::pair(std::string(serving(r, machine).name),
                         reasons_of([&](const Kernel& kernel) { return why_another(kernel, r, machine); }));
      },
      "request"_a, "machine"_a,
      "The name of the kernel that serves a call, and for every other one why it does not.");
  m.def(
      "refusals",
      [](const Request& r, const Machine& machine) {
        return reasons_of([&](const Kernel& kernel) { return why_not(kernel, r, machine); });
      },
      "request"_a, "machine"_a,
      "Kernels that cannot serve a call, even if it asks for them by name, and why.");
  m.def(
      "unusable",
      [](const Machine& machine) {
        return reasons_of([&](const Kernel& kernel) { return unusable(kernel, machine); });
      },
      "machine"_a, "Kernels that do not run on a machine, whatever the call, and why.");
}

}  // namespace two_level_mha
