// SPDX-License-Identifier: Apache-2.0
// Turns errors of CUDA calls into misa::Error.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "misa/error.hpp"

namespace misa::cuda {

inline void check(cudaError_t result, const char* call) {
  if (result != cudaSuccess) {
    throw Error(ErrorCode::internal, std::string(call) + ": " + cudaGetErrorString(result) + " (" +
                                         cudaGetErrorName(result) + ")");
  }
}

}  // namespace misa::cuda
