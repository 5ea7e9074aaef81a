// SPDX-License-Identifier: Apache-2.0
// The floors of scoring on Hopper, in loops of nothing else: products of e4m3, products and
// weighted ReLU sums, and these with the gate, which no score passes; and a copy in device memory.
// Prints JSON: medians of 9 launches of about 20 ms each, the least and the greatest.
//
// A product is 64 keys times 128 rows, 16 queries of 8 rows. Four warpgroups of a thread block on
// each SM take turns at products and sums, as in fused scoring; their operands stay in shared
// memory. Cycles are those of the SM.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "gpu/device.hpp"

namespace misa::bench {
namespace {

using cuda::check;

enum class Loop { products, scores, gated };

constexpr int kKeys = 64;
constexpr int kRows = 128;
constexpr int kDim = 128;
constexpr int kRowsOfQuery = 8;
constexpr int kWarpgroups = 4;
constexpr int kThreads = 128 * kWarpgroups;
constexpr int kProducts = 36'000;  // of a warpgroup
constexpr int kRuns = 9;
constexpr std::size_t kSharedBytes = (kWarpgroups * kKeys + kRows) * kDim + 1024;
constexpr double kFlops = 2.0 * kKeys * kRows * kDim;  // of a product

template <Loop loop>
__global__ void __launch_bounds__(kThreads, 1)
    loop_kernel(float threshold, float* out, std::int64_t* cycles) {
  extern __shared__ std::uint8_t memory[];
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
  std::uint8_t* const tiles = memory + (1024 - address % 1024) % 1024;
  // Entries of either sign and some exponents: what the chip draws depends on the data.
  std::uint32_t random = threadIdx.x + blockIdx.x * kThreads + 1;
  for (int i = static_cast<int>(threadIdx.x); i < (kWarpgroups * kKeys + kRows) * kDim;
       i += kThreads) {
    random = random * 1664525 + 1013904223;
    tiles[i] = static_cast<std::uint8_t>(random >> 24 & 0xBF);
  }
  const int group = static_cast<int>(threadIdx.x) / 128;
  const std::uint64_t keys = cuda::swizzled_tile(tiles + group * kKeys * kDim);
  const std::uint64_t rows = cuda::swizzled_tile(tiles + kWarpgroups * kKeys * kDim);
  float weights[kRows / 4];  // of this thread's columns
  for (float& weight : weights) {
    random = random * 1664525 + 1013904223;
    weight = static_cast<float>(random >> 8) * 0x1p-24F;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  float d[kRows / 2] = {};
  float kept = 0;
  const std::int64_t start = clock64();
  for (int product = 0; product < kProducts; ++product) {
    cuda::wgmma_pin(d);
    cuda::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 32; ++k) {
      // Products alone are added up, as the compiler leaves out those that nothing reads.
      cuda::wgmma_e4m3<kRows>(d, keys + 2 * k, rows + 2 * k, loop == Loop::products || k > 0);
    }
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    cuda::wgmma_pin(d);
    if constexpr (loop != Loop::products) {
      // A thread has 32 of the columns for each of two keys: four queries of 8 rows.
#pragma unroll
      for (int query = 0; query < kRows / 4 / kRowsOfQuery; ++query) {
        float scores[2] = {0, 0};
#pragma unroll
        for (int row = 0; row < kRowsOfQuery; ++row) {
          const int column = query * kRowsOfQuery + row;
#pragma unroll
          for (int key = 0; key < 2; ++key) {
            // Two neighbouring columns, then the same of the other key.
            const float dot = d[4 * (column / 2) + 2 * key + column % 2];
            scores[key] = __fmaf_rn(weights[column], fmaxf(dot, 0.0F), scores[key]);
          }
        }
#pragma unroll
        for (int key = 0; key < 2; ++key) {
          if constexpr (loop == Loop::gated) {
            if (scores[key] * weights[0] > threshold) {
              out[(blockIdx.x * kThreads + threadIdx.x) * 2 + key] = scores[key];
            }
          } else {
            kept += scores[key];
          }
        }
      }
    }
  }
  const std::int64_t end = clock64();
  if (loop == Loop::products) {
    kept = d[0];
  }
  out[blockIdx.x * kThreads + threadIdx.x] = kept;
  if (threadIdx.x == 0) {
    cycles[blockIdx.x] = end - start;
  }
}

// Milliseconds of each launch.
std::vector<double> launches(const std::function<void()>& launch) {
  cudaEvent_t start = nullptr;
  cudaEvent_t stop = nullptr;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  std::vector<double> found;
  for (int run = -1; run < kRuns; ++run) {  // the first is not counted
    check(cudaEventRecord(start), "cudaEventRecord");
    launch();
    check(cudaEventRecord(stop), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
    if (run >= 0) {
      found.push_back(ms);
    }
  }
  check(cudaEventDestroy(start), "cudaEventDestroy");
  check(cudaEventDestroy(stop), "cudaEventDestroy");
  std::ranges::sort(found);
  return found;
}

// Adds NAME, and its least and greatest, where `amount` is done in each of these times.
void add(nlohmann::ordered_json& json, const std::string& name, double amount,
         const std::vector<double>& ms) {
  json[name] = amount / ms[kRuns / 2];
  json[name + "_low"] = amount / ms.back();
  json[name + "_high"] = amount / ms.front();
}

template <Loop loop>
void time_loop(nlohmann::ordered_json& json, const std::string& name) {
  const int sms = cuda::device_attribute(cudaDevAttrMultiProcessorCount);
  const Device<float> out(static_cast<std::size_t>(sms) * kThreads * 2);
  const Device<std::int64_t> cycles(static_cast<std::size_t>(sms));
  check(cudaFuncSetAttribute(loop_kernel<loop>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(kSharedBytes)),
        "cudaFuncSetAttribute");
  const std::vector<double> ms = launches([&] {
    loop_kernel<loop><<<sms, kThreads, kSharedBytes>>>(std::numeric_limits<float>::infinity(),
                                                       out.data(), cycles.data());
    check(cudaGetLastError(), "loop_kernel");
  });
  std::vector<std::int64_t> counted(static_cast<std::size_t>(sms));
  check(cudaMemcpy(counted.data(), cycles.data(), cycles.bytes(), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  std::ranges::sort(counted);
  add(json, name + "_tflops", 1e-9 * kFlops * kProducts * kWarpgroups * sms, ms);
  json[name + "_cycles"] = static_cast<double>(counted[counted.size() / 2]) /
                           (static_cast<double>(kProducts) * kWarpgroups);
}

void run() {
  nlohmann::ordered_json json;
  time_loop<Loop::products>(json, "products");
  time_loop<Loop::scores>(json, "scores");
  time_loop<Loop::gated>(json, "gated");
  const Device<std::uint8_t> from(std::size_t{1} << 30);
  const Device<std::uint8_t> to(std::size_t{1} << 30);
  const std::vector<double> ms = launches([&] {
    for (int i = 0; i < 40; ++i) {
      check(cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice),
            "cudaMemcpyAsync");
    }
  });
  add(json, "copy_tbps", 1e-9 * 40 * 2 * static_cast<double>(from.bytes()), ms);  // read, written
  std::puts(json.dump(2).c_str());
}

}  // namespace
}  // namespace misa::bench

int main() {
  try {
    misa::bench::run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "misa_micro_gpu: %s\n", error.what());
    return 1;
  }
  return 0;
}
