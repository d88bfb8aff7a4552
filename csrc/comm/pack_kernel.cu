#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../base/grid_stride.cuh"
#include "pack_kernel.cuh"

namespace two_level_mha {

namespace {

template <int kBytes>
cudaError_t pack(const PackParams& params, int multiprocessors, cudaStream_t stream) {
  return launch_grid_stride(PackWork<kBytes>{params}, params.parts * params.part_units, multiprocessors,
                            stream);
}

template <int kBytes, typename Scalar, typename Real>
cudaError_t unpack(const PackParams& params, int multiprocessors, cudaStream_t stream) {
  if constexpr (kBytes >= sizeof(Scalar))
    return launch_grid_stride(UnpackWork<kBytes, Scalar, Real>{params}, params.parts * params.part_units,
                              multiprocessors, stream);
  else
    return cudaErrorInvalidValue;
}

template <typename Scalar, typename Real>
cudaError_t unpack_as(const PackParams& params, int64_t unit_bytes, int multiprocessors,
                      cudaStream_t stream) {
  switch (unit_bytes) {
    case 16:
      return unpack<16, Scalar, Real>(params, multiprocessors, stream);
    case 8:
      return unpack<8, Scalar, Real>(params, multiprocessors, stream);
    case 4:
      return unpack<4, Scalar, Real>(params, multiprocessors, stream);
    case 2:
      return unpack<2, Scalar, Real>(params, multiprocessors, stream);
    case 1:
      return unpack<1, Scalar, Real>(params, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_pack(const PackParams& params, int64_t unit_bytes, int multiprocessors,
                        cudaStream_t stream) {
  switch (unit_bytes) {
    case 16:
      return pack<16>(params, multiprocessors, stream);
    case 8:
      return pack<8>(params, multiprocessors, stream);
    case 4:
      return pack<4>(params, multiprocessors, stream);
    case 2:
      return pack<2>(params, multiprocessors, stream);
    case 1:
      return pack<1>(params, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_unpack(const PackParams& params, int64_t unit_bytes, SumType sum, int multiprocessors,
                          cudaStream_t stream) {
  switch (sum) {
    case SumType::none:
      return unpack_as<uint8_t, uint8_t>(params, unit_bytes, multiprocessors, stream);
    case SumType::float64:
      return unpack_as<double, double>(params, unit_bytes, multiprocessors, stream);
    case SumType::float32:
      return unpack_as<float, float>(params, unit_bytes, multiprocessors, stream);
    case SumType::float16:
      return unpack_as<__half, float>(params, unit_bytes, multiprocessors, stream);
    case SumType::bfloat16:
      return unpack_as<__nv_bfloat16, float>(params, unit_bytes, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace two_level_mha
