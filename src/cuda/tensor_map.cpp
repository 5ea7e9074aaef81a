// SPDX-License-Identifier: Apache-2.0
#include "cuda/tensor_map.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/check.cuh"
#include "misa/error.hpp"

namespace misa::cuda {

template <std::size_t rank>
CUtensorMap tensor_map(const void* data, const std::array<cuuint64_t, rank>& sizes,
                       const std::array<cuuint64_t, rank - 1>& strides,
                       const std::array<cuuint32_t, rank>& box) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) {
      throw Error(ErrorCode::unsupported, "cuTensorMapEncodeTiled: not in this driver");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  std::array<cuuint32_t, rank> steps;
  steps.fill(1);
  CUtensorMap map{};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, static_cast<cuuint32_t>(rank),
             const_cast<void*>(data), sizes.data(), strides.data(), box.data(), steps.data(),
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::internal,
                "cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

template CUtensorMap tensor_map<2>(const void*, const std::array<cuuint64_t, 2>&,
                                   const std::array<cuuint64_t, 1>&,
                                   const std::array<cuuint32_t, 2>&);
template CUtensorMap tensor_map<3>(const void*, const std::array<cuuint64_t, 3>&,
                                   const std::array<cuuint64_t, 2>&,
                                   const std::array<cuuint32_t, 3>&);

}  // namespace misa::cuda
