// SPDX-License-Identifier: Apache-2.0
#include "cuda/target.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <array>
#include <vector>

#include "cuda/architectures.hpp"
#include "cuda/check.cuh"

namespace misa::cuda {
namespace {

// Every compute capability from 8.0 on that has been announced.
constexpr std::array kKnownArchs{80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

const std::vector<Architecture>& architectures() {
  static const std::vector<Architecture> all = parse_architectures(MISA_CUDA_ARCHITECTURES);
  return all;
}

const std::vector<Architecture>& sm90_architectures() {
  static const std::vector<Architecture> all = parse_architectures(MISA_CUDA_SM90_ARCHITECTURES);
  return all;
}

// Every target runs the generic kernels too.
bool serves(int arch, MatrixInstructions matrix) {
  return any_serves(architectures(), arch) &&
         (matrix != MatrixInstructions::wgmma || any_serves(sm90_architectures(), arch));
}

std::string requirement_of(MatrixInstructions matrix) {
  std::vector<std::string> served;
  for (const int arch : kKnownArchs) {
    if (serves(arch, matrix)) {
      served.push_back(fmt::format("{}.{}", arch / 10, arch % 10));
    }
  }
  if (served.empty()) {
    return "a build with code for its architecture";
  }
  const std::string list = served.size() == kKnownArchs.size()
                               ? served.front() + " or above"
                               : fmt::format("{}", fmt::join(served, ", "));
  return "a GPU of compute capability " + list + ", and a driver";
}

bool any_device() {
  static const bool found = [] {
    int count = 0;
    const bool any = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
    cudaGetLastError();  // so that no later call reports this error
    return any;
  }();
  return found;
}

// 10 * major + minor of the current device; 0 if unknown.
int current_arch() {
  int device = 0;
  int major = 0;
  int minor = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known ? 10 * major + minor : 0;
}

int attribute(cudaDeviceAttr which) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

std::span<const Target> targets() {
  // The priorities exceed those of the CPU backends, so a device is preferred where there is one.
  static const std::array list{
      Target{"cuda-sm90", "CUDA wgmma", requirement_of(MatrixInstructions::wgmma), 110,
             MatrixInstructions::wgmma},
      Target{"cuda-generic", "CUDA mma.sync", requirement_of(MatrixInstructions::mma), 100,
             MatrixInstructions::mma},
  };
  return list;
}

bool runs_on(const Target& target, int arch) { return serves(arch, target.matrix); }

bool available(const Target& target) { return any_device() && runs_on(target, current_arch()); }

std::vector<Fact> facts() {
  const auto version_of = [](cudaError_t (*query)(int*)) {
    int version = 0;
    return query(&version) == cudaSuccess && version > 0
               ? fmt::format("{}.{}", version / 1000, version % 1000 / 10)
               : std::string("none");
  };
  std::vector<Fact> all{
      {"cuda", version_of(&cudaRuntimeGetVersion)},
      {"cuda architectures", MISA_CUDA_ARCHITECTURES "," MISA_CUDA_SM90_ARCHITECTURES},
      {"cuda driver", version_of(&cudaDriverGetVersion)},
  };
  int count = 0;
  for (int i = 0; any_device() && cudaGetDeviceCount(&count) == cudaSuccess && i < count; ++i) {
    cudaDeviceProp device{};
    if (cudaGetDeviceProperties(&device, i) == cudaSuccess) {
      all.push_back({fmt::format("cuda device {}", i),
                     fmt::format("{}, compute capability {}.{}, {} SMs, {:.1f} GiB", device.name,
                                 device.major, device.minor, device.multiProcessorCount,
                                 static_cast<double>(device.totalGlobalMem) / (1 << 30))});
    }
  }
  cudaGetLastError();  // so that no later call reports an error of these
  return all;
}

DeviceTraits traits_of(const Target& target) {
  return {target.matrix,
          static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          attribute(cudaDevAttrMultiProcessorCount)};
}

}  // namespace misa::cuda
