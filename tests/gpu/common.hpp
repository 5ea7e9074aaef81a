// SPDX-License-Identifier: Apache-2.0
// Shared by the tests on devices: every test runs for every CUDA backend of this build, and is
// skipped where no device can run it.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "indexers/common.hpp"

namespace misa::test {

inline std::vector<std::string> cuda_backends_of_this_build() {
  std::vector<std::string> names;
  for (const BackendInfo& backend : backends()) {
    if (backend.name.starts_with("cuda-")) {
      names.push_back(backend.name);
    }
  }
  return names;
}

// Tests of what every device does, whatever the backend; skipped without one.
class OnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no device";
    }
  }
};

inline void expect_success(cudaError_t result) {
  ASSERT_EQ(result, cudaSuccess) << cudaGetErrorName(result);
}

// Waits for the work on a stream; false if that takes far longer than any test's.
inline bool ends(cudaStream_t stream) {
  const auto start = std::chrono::steady_clock::now();
  cudaError_t result = cudaErrorNotReady;
  while ((result = cudaStreamQuery(stream)) == cudaErrorNotReady) {
    if (std::chrono::steady_clock::now() - start > std::chrono::minutes(2)) {
      return false;
    }
  }
  expect_success(result);
  return true;
}

// A device array between two red zones of 0xff: a NaN in every dtype, -1 as an index.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::size_t count) : count_(count) {
    expect_success(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes() + 2 * kZone));
    expect_success(cudaMemset(memory_, 0xff, bytes() + 2 * kZone));
  }
  explicit Guarded(std::span<const T> values) : Guarded(values.size()) { write(values); }
  ~Guarded() { cudaFree(memory_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  [[nodiscard]] T* data() const { return reinterpret_cast<T*>(memory_ + kZone); }
  [[nodiscard]] std::span<T> span() const { return {data(), count_}; }

  void write(std::span<const T> values) const {
    expect_success(cudaMemcpy(data(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice));
  }

  // The array's content; checks that the red zones are unchanged.
  [[nodiscard]] std::vector<T> read() const {
    expect_red_zones();
    std::vector<T> values(count_);
    expect_success(cudaMemcpy(values.data(), data(), bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

  void expect_red_zones() const {
    std::vector<std::byte> zone(kZone);
    const auto untouched = [&](const std::byte* there) {
      expect_success(cudaMemcpy(zone.data(), there, kZone, cudaMemcpyDeviceToHost));
      return std::ranges::all_of(zone, [](std::byte b) { return b == std::byte{0xff}; });
    };
    EXPECT_TRUE(untouched(memory_)) << "written before";
    EXPECT_TRUE(untouched(memory_ + kZone + bytes())) << "written after";
  }

 private:
  static constexpr std::ptrdiff_t kZone = 1 << 16;

  [[nodiscard]] std::size_t bytes() const { return count_ * sizeof(T); }

  std::size_t count_;
  std::byte* memory_ = nullptr;
};

class EachCudaBackend : public EachBackend {
 protected:
  void SetUp() override {
    const auto available = available_backends();
    if (std::find(available.begin(), available.end(), GetParam()) == available.end()) {
      GTEST_SKIP() << "no device here can run " << GetParam();
    }
  }
};

}  // namespace misa::test
