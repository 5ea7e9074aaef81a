// SPDX-License-Identifier: Apache-2.0
// Arrays in device memory, for the benchmarks.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "cuda/check.cuh"

namespace misa::bench {

template <class T>
class Device {
 public:
  explicit Device(std::size_t size) : size_(size) {
    cuda::check(
        cudaMalloc(reinterpret_cast<void**>(&data_), std::max<std::size_t>(1, size) * sizeof(T)),
        "cudaMalloc");
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) { fill(values); }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::span<T> span() const { return {data_, size_}; }
  [[nodiscard]] std::size_t bytes() const { return size_ * sizeof(T); }

  // Fills the array with copies of the values.
  void fill(const std::vector<T>& values) {
    for (std::size_t i = 0; i < size_; i += values.size()) {
      const std::size_t count = std::min(size_ - i, values.size());
      cuda::check(cudaMemcpy(data_ + i, values.data(), count * sizeof(T), cudaMemcpyHostToDevice),
                  "cudaMemcpy");
    }
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

}  // namespace misa::bench
