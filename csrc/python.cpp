// The Python module `_C`: what Python asks of C++ besides the operators, which are reached through torch.ops.
#include <torch/extension.h>
#include <torch/version.h>

#include <map>
#include <string>

namespace {

std::map<std::string, std::string> build_info() {
#ifdef TLM_WITH_CUDA
  const char* cuda = "yes";
#else
  const char* cuda = "no";
#endif
  return {{"torch", TORCH_VERSION}, {"cuda", cuda}, {"archs", TLM_ARCHS}, {"compiler", __VERSION__}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What was compiled in: torch (version), cuda (yes or no), archs (GPU architectures), compiler.");
}
