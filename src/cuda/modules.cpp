// SPDX-License-Identifier: Apache-2.0
#include "cuda/modules.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "cuda/check.cuh"
#include "misa/error.hpp"

namespace misa::cuda {
namespace {

// Constant once the library is loaded.
const KernelFile*& first_file() {
  static const KernelFile* first = nullptr;
  return first;
}

// A function of the driver, or null if the driver is older than this version of CUDA.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t result =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
  cudaGetLastError();  // so that no later call reports this error
  return result == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Function>(function)
             : nullptr;
}

void check_driver(CUresult result, const char* call) {
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::internal,
                std::string(call) + ": error " + std::to_string(static_cast<int>(result)));
  }
}

}  // namespace

KernelFile::KernelFile(const void* any_kernel) : kernel(any_kernel), next(first_file()) {
  first_file() = this;
}

int load_kernels() {
  const auto module_of = driver_function<decltype(&cuFuncGetModule)>("cuFuncGetModule", 11000);
  const auto count_of =
      driver_function<decltype(&cuModuleGetFunctionCount)>("cuModuleGetFunctionCount", 12040);
  const auto enumerate =
      driver_function<decltype(&cuModuleEnumerateFunctions)>("cuModuleEnumerateFunctions", 12040);
  const auto load = driver_function<decltype(&cuFuncLoad)>("cuFuncLoad", 12040);
  if (module_of == nullptr || count_of == nullptr || enumerate == nullptr || load == nullptr) {
    return 0;
  }
  int loaded = 0;
  for (const KernelFile* file = first_file(); file != nullptr; file = file->next) {
    cudaFunction_t function = nullptr;
    if (cudaGetFuncBySymbol(&function, file->kernel) != cudaSuccess) {
      cudaGetLastError();  // a file without code for this device: none of its kernels is launched
      continue;
    }
    CUmodule code = nullptr;
    unsigned count = 0;
    check_driver(module_of(&code, function), "cuFuncGetModule");
    check_driver(count_of(&count, code), "cuModuleGetFunctionCount");
    std::vector<CUfunction> functions(count);
    check_driver(enumerate(functions.data(), count, code), "cuModuleEnumerateFunctions");
    for (const CUfunction kernel : functions) {
      check_driver(load(kernel), "cuFuncLoad");
      ++loaded;
    }
  }
  return loaded;
}

}  // namespace misa::cuda
