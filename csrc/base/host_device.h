// TLM_HOST_DEVICE marks a function that kernels share with the host.
#pragma once

#if defined(__CUDACC__)
#define TLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TLM_HOST_DEVICE inline __attribute__((always_inline))
#endif
