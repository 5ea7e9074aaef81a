// Launching a kernel of kThreads threads a row.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/check.cuh"
#include "select/generic_config.cuh"

namespace misa::cuda::select {

// Bytes of shared memory that a block of the current device may have.
inline std::size_t shared_limit() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return static_cast<std::size_t>(limit);
}

// A block a row; rows > 0.
template <class... Arguments>
void launch(void (*kernel)(Arguments...), std::int64_t rows, int threads, std::size_t bytes,
            void* stream, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
}

}  // namespace misa::cuda::select
