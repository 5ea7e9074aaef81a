#include "cuda/target.hpp"

#include <cuda_runtime_api.h>

#include <array>
#include <limits>

#include "cuda/check.cuh"

namespace misa::cuda {
namespace {

// Priorities above those of the CPU's: where there is a device, it is what the caller wants.
constexpr std::array kTargets{
    // wgmma is Hopper's alone: no later device runs its code.
    Target{"cuda-sm90", "CUDA wgmma", "a GPU of compute capability 9.0, and a driver", 110, 90, 90,
           true},
    Target{"cuda-generic", "CUDA mma.sync",
           "a GPU of compute capability 8.0 or above, and a driver", 100, 80,
           std::numeric_limits<int>::max(), false},
};

bool any_device() {
  static const bool found = [] {
    int count = 0;
    const bool any = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    cudaGetLastError();  // no device is no error of a later call
    return any;
  }();
  return found;
}

// Of the current device; 0 if it cannot be told.
int capability() {
  int device = 0;
  int major = 0;
  int minor = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known ? 10 * major + minor : 0;
}

}  // namespace

std::span<const Target> targets() { return kTargets; }

bool available(const Target& target) {
  const int has = any_device() ? capability() : 0;
  return target.least_capability <= has && has <= target.most_capability;
}

Device device_of(const Target& target) {
  int device = 0;
  int processors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return {target.hopper, processors};
}

}  // namespace misa::cuda
