#include <ATen/cuda/CUDAContext.h>

#include "machine.h"

namespace two_level_mha {

int gpu_arch(int64_t device) {
  const auto* properties = at::cuda::getDeviceProperties(device);
  return 10 * properties->major + properties->minor;
}

}  // namespace two_level_mha
