#include "machine.h"

#include <ATen/Context.h>

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
  return machine;
}

}  // namespace two_level_mha
