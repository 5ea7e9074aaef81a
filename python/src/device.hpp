// SPDX-License-Identifier: Apache-2.0
// The device of a call's arrays.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <string>
#include <string_view>

#include "misa/error.hpp"

namespace misa::python {

// Makes a device current for this object's lifetime.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  static void check(cudaError_t result, std::string_view call) {
    if (result != cudaSuccess) {
      throw Error(ErrorCode::internal, fmt::format("{}: {}", call, cudaGetErrorString(result)));
    }
  }

  int before_ = 0;
};

inline void require_device(int device) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);  // leaves count unchanged if it fails
  if (device >= count) {
    const std::string why =
        result == cudaSuccess ? "" : fmt::format(" ({})", cudaGetErrorString(result));
    throw Error(
        ErrorCode::unsupported,
        fmt::format("device: expected one of {} CUDA devices, got cuda:{}{}", count, device, why));
  }
}

}  // namespace misa::python
