// A bound for each row from a sample of its scores: one warp a row, the sample in registers.
//
//  1. Samples become keys (entry.hpp); NaN, the key 0, is no sample.
//  2. If k of the row's n scores are wanted and c of them are sampled, without replacement, the
//     sample holds k c / n of them, give or take its standard deviation. The bound's rank in the
//     sample is kDeviations above that.
//  3. Bisection over keys finds one that about as many samples reach: no shared memory, no barrier,
//     two instructions a sample and step.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/check.cuh"
#include "cuda/range.cuh"
#include "select/entry.hpp"
#include "select/fused.hpp"
#include "select/radix.cuh"

namespace misa::cuda::select {
namespace {

// Rows a block. Few, so that few rows still spread over the SMs.
constexpr int kRowsPerBlock = 4;

// A normal tail of 4.5 deviations: a few rows in a million fall short and are selected again.
constexpr float kDeviations = 4.5F;

// The rank (from 1) of the bound in a sample of `count`, of `keys` keys.
__device__ std::uint32_t bound_rank(std::uint32_t count, std::uint32_t keys, std::uint32_t top_k) {
  const float share = static_cast<float>(top_k) / static_cast<float>(keys);
  const float sampled = static_cast<float>(count) / static_cast<float>(keys);
  const float mean = share * static_cast<float>(count);
  const float variance = mean * (1 - share) * fmaxf(0, 1 - sampled);
  // One more: the bound itself does not exceed it.
  return static_cast<std::uint32_t>(ceilf(mean + kDeviations * sqrtf(variance))) + 1;
}

// kKeys samples a lane.
template <int kKeys>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    threshold_kernel(const Samples samples, const Keys visible_keys, const std::int64_t rows,
                     const std::uint32_t top_k, float* bounds, std::uint32_t* miss_count) {
  const std::uint32_t lane = threadIdx.x % 32;
  const std::int64_t t = std::int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *miss_count = 0;
  }
  if (t >= rows) {
    return;
  }
  constexpr float kAll = -std::numeric_limits<float>::infinity();
  const auto length = static_cast<std::uint32_t>(visible(visible_keys, t).length);
  if (length <= top_k) {
    if (lane == 0) {
      bounds[t] = kAll;
    }
    return;
  }

  // Step 1.
  const float* row = samples.scores + t * samples.stride;
  float scores[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const std::uint32_t column = i * 32 + lane;
    scores[i] = column < samples.columns ? row[column] : std::numeric_limits<float>::quiet_NaN();
  }
  std::uint32_t keys[kKeys];
  std::uint32_t low = kWarp;
  std::uint32_t high = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    keys[i] = ordered_bits(scores[i]);
    low = min(low, keys[i] != 0 ? keys[i] : kWarp);
    high = max(high, keys[i]);
  }
  low = __reduce_min_sync(kWarp, low);
  high = __reduce_max_sync(kWarp, high);
  const auto count_from = [&](std::uint32_t key) {
    std::uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      own += keys[i] >= key ? 1 : 0;
    }
    return __reduce_add_sync(kWarp, own);
  };

  // Step 2.
  const std::uint32_t count = count_from(1);
  const std::uint32_t wanted = bound_rank(count, length, top_k);
  if (count < wanted) {
    if (lane == 0) {
      bounds[t] = kAll;
    }
    return;
  }

  // Step 3. At least `wanted` samples reach `low`, fewer reach what lies above `high`. A sixteenth
  // more samples than wanted are taken for a step or two less.
  std::uint32_t reached = count;
  while (low < high && reached > wanted + wanted / 16) {
    const std::uint32_t middle = low + (high - low + 1) / 2;
    const std::uint32_t found = count_from(middle);
    if (found >= wanted) {
      low = middle;
      reached = found;
    } else {
      high = middle - 1;
    }
  }
  // A plateau that is too wide is left out: it could not pass whole, and what lies above it may do.
  if (lane == 0) {
    bounds[t] = reached > wanted + wanted / 2 ? score_of_bits(low) : bound_below(low);
  }
}

}  // namespace

void launch_threshold(const Samples& samples, const Keys& keys, std::int64_t rows, int top_k,
                      float* bounds, const Misses& misses, void* stream) {
  auto* kernel = samples.columns <= 1024   ? threshold_kernel<32>
                 : samples.columns <= 2048 ? threshold_kernel<64>
                                           : threshold_kernel<kMaxSamples / 32>;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock));
  config.blockDim = dim3(32 * kRowsPerBlock);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, samples, keys, rows, static_cast<std::uint32_t>(top_k),
                           bounds, misses.count),
        "cudaLaunchKernelEx");
}

}  // namespace misa::cuda::select
