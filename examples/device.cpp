// SPDX-License-Identifier: Apache-2.0
// MISA on device memory, as a serving engine runs it: plan once, then enqueue steps on a stream.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <misa/cuda.hpp>
#include <span>
#include <vector>

namespace {

// An engine's tensors are on the device already; here they are filled with one byte value.
template <class T>
T* device_array(std::size_t count, int byte) {
  void* data = nullptr;
  if (cudaMalloc(&data, count * sizeof(T)) != cudaSuccess ||
      cudaMemset(data, byte, count * sizeof(T)) != cudaSuccess) {
    std::fprintf(stderr, "needs a CUDA device with free memory\n");
    std::exit(1);
  }
  return static_cast<T*>(data);
}

template <class T>
T* device_copy(const std::vector<T>& values) {
  T* data = device_array<T>(values.size(), 0);
  cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return data;
}

}  // namespace

int main() try {
  constexpr std::int64_t kQueries = 64, kHeads = 64, kDim = 128, kKeys = 9000, kTopK = 2048;
  const auto* q = device_array<std::uint8_t>(kQueries * kHeads * kDim, 0x30);  // e4m3 0.5
  const auto* k = device_array<std::uint8_t>(kKeys * kDim, 0x28);              // e4m3 0.25
  const float* w = device_copy(std::vector<float>(kQueries * kHeads, 0.01F));
  const float* k_scale = device_copy(std::vector<float>(kKeys, 0.02F));
  const std::int32_t* ks = device_copy(std::vector<std::int32_t>(kQueries, 0));
  const std::int32_t* ke = device_copy(std::vector<std::int32_t>(kQueries, kKeys));
  auto* indices = device_array<std::int32_t>(kQueries * kTopK, 0);

  const misa::cuda::Plan plan(
      misa::IndexerConfig::misa(kTopK, /*heads=*/8),
      {kQueries, kHeads, kDim, /*max_keys=*/kKeys, misa::DType::e4m3, misa::DType::e4m3},
      {.total_keys = kKeys});
  const std::span workspace(device_array<std::byte>(plan.workspace_bytes(), 0),
                            plan.workspace_bytes());

  misa::RaggedKeys keys{k, misa::DType::e4m3, kKeys, kDim, 0, k_scale, {}, {}};
  keys.starts = {ks, kQueries};
  keys.ends = {ke, kQueries};
  misa::Selection out;
  out.indices = {indices, kQueries * kTopK};
  cudaStream_t stream = nullptr;
  plan.run({q, misa::DType::e4m3, kQueries, kHeads, kDim}, {w, kQueries, kHeads}, keys, out,
           workspace, stream);

  std::int32_t last = 0;
  cudaMemcpy(&last, indices + kTopK - 1, sizeof last, cudaMemcpyDeviceToHost);
  std::printf("%.*s: query 0 attends to positions 0 ... %d\n",
              static_cast<int>(plan.backend().size()), plan.backend().data(), last);
} catch (const misa::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
