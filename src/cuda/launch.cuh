// SPDX-License-Identifier: Apache-2.0
// Launching kernels with programmatic dependent launch, where the device has it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/check.cuh"
#include "cuda/modules.hpp"

namespace misa::cuda {

#ifdef __CUDACC__
// The kernel by which load_kernels finds those of the file that includes this.
namespace {
__global__ void kernel_of_file() {}
const KernelFile this_file(reinterpret_cast<const void*>(&kernel_of_file));
}  // namespace
#endif

// Waits until the previous kernel of the stream has completed, then lets thread blocks of the next
// one start early; they wait here too. Every kernel calls it before it reads or writes memory that
// this kernel or the previous one writes. Whatever older kernels wrote may be read before the call.
__device__ inline void begin_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A device attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Bytes of shared memory that a thread block may have on the current device.
inline std::size_t shared_limit() {
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Lets thread blocks of a kernel have `bytes` of dynamic shared memory and as much more as the
// device has. The limit belongs to the device, not to a launch: it is never lowered, as other
// threads may be launching the kernel with more, and graphs may have captured it so.
inline void allow_shared(const char* name, const void* kernel, std::size_t bytes) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  if (static_cast<std::size_t>(attributes.maxDynamicSharedSizeBytes) < bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_limit() - attributes.sharedSizeBytes)),
          name);
  }
}

// Enqueues a kernel that calls begin_kernel, with `bytes` of dynamic shared memory, in clusters of
// `cluster` thread blocks; more than one needs compute capability 9.0. From there on, its launch
// overlaps the end of the previous kernel.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* name, void (*kernel)(Parameters...), dim3 grid, int cluster,
                     int threads, std::size_t bytes, void* stream, const Arguments&... arguments) {
  if (bytes > 0) {
    allow_shared(name, reinterpret_cast<const void*>(kernel), bytes);
  }
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  const bool overlaps = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  config.numAttrs = overlaps ? (cluster > 1 ? 2 : 1) : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// The same without clusters.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
                   std::size_t bytes, void* stream, const Arguments&... arguments) {
  launch_clusters(name, kernel, grid, 1, threads, bytes, stream, arguments...);
}

}  // namespace misa::cuda
