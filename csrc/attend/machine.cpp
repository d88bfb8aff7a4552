#include "machine.h"

#include <ATen/Context.h>
#include <c10/util/env.h>
#include <torch/headeronly/version.h>

#include "cpu/level.h"

namespace two_level_mha {

Machine machine_of(const at::Tensor& x) {
  Machine machine;
  machine.cpu = cpu_level();
  machine.cuda = x.is_cuda();
  if (!machine.cuda) return machine;
#ifdef TLM_WITH_CUDA
  machine.arch = gpu_arch(x.get_device());
#endif
  const at::Context& context = at::globalContext();
  machine.cudnn = context.hasCuDNN() ? context.versionRuntimeCuDNN() : 0;
  machine.cudnn_enabled = context.userEnabledCuDNNSDP();
  machine.flash_enabled = context.userEnabledFlashSDP();
  machine.efficient_enabled = context.userEnabledMemEfficientSDP();
  // It is not deterministic, and in this experimental mode of torch its statistics lie in another order. No
  // GPU has confirmed it: false here switches it off.
  machine.cudnn_backward =
      !context.deterministicAlgorithms() && c10::utils::check_env("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") != true;
  machine.offset_windows = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 15;
  return machine;
}

}  // namespace two_level_mha
