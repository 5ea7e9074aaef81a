// SPDX-License-Identifier: Apache-2.0
// A threshold for each row from a sample of its scores: one small thread block a row, the sample in
// registers.
//
//  1. Samples become keys (entry.hpp); NaN, the key 0, is no sample.
//  2. If k of the row's n scores are wanted and c of them are sampled, without replacement, the
//     sample holds k c / n of them, give or take its standard deviation. The threshold's rank in
//     the sample is kDeviations above that.
//  3. RadixHistogram of the keys (threshold.cuh) narrow down where that rank lies, until a bin
//  would let
//     through few more.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "select/fused.hpp"
#include "select/gate_threshold.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {
namespace {

// Samples a thread.
constexpr int kOwn = 32;

constexpr int kBucketBits = 9;  // an octave into 128 (threshold.cuh)

// A normal tail of 4.5 deviations: a few rows in a million fall short and are selected again. The
// count is nearly a Poisson variable, whose tail is longer: by (4.5^2 - 1) / 6 counts in its
// Cornish-Fisher expansion (at a mean of 32 it would be 16 rows in a million without).
constexpr float kDeviations = 4.5F;
constexpr float kSkew = (kDeviations * kDeviations - 1) / 6;

// The rank (from 1) of the threshold in a sample of `count`, of `keys` keys.
__device__ std::uint32_t threshold_rank(std::uint32_t count, std::uint32_t keys,
                                        std::uint32_t top_k) {
  const float share = static_cast<float>(top_k) / static_cast<float>(keys);
  const float sampled = static_cast<float>(count) / static_cast<float>(keys);
  const float mean = share * static_cast<float>(count);
  const float variance = mean * (1 - share) * fmaxf(0, 1 - sampled);
  // One more: the threshold itself does not exceed it.
  return static_cast<std::uint32_t>(ceilf(mean + kDeviations * sqrtf(variance) + kSkew)) + 1;
}

template <int threads>
__global__ void __launch_bounds__(threads)
    threshold_kernel(const Samples samples, const Keys visible_keys, const std::uint32_t top_k,
                     float* thresholds, const FallbackRows fallback) {
  begin_kernel();
  using Radix = RadixHistogram<threads, kBucketBits>;
  __shared__ typename Radix::Shared shared;
  const std::int64_t t = blockIdx.x;
  if (threadIdx.x == 0) {
    fallback.parts[t] = 0;
    if (t == 0) {
      *fallback.count = 0;
    }
  }
  constexpr float kAll = -std::numeric_limits<float>::infinity();
  const auto length = static_cast<std::uint32_t>(visible(visible_keys, t).length);
  if (length <= top_k) {
    if (threadIdx.x == 0) {
      thresholds[t] = kAll;
    }
    return;
  }

  // Step 1.
  const float* row = samples.scores + t * samples.stride;
  float scores[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const std::uint32_t column = i * threads + threadIdx.x;
    scores[i] = column < samples.columns ? row[column] : std::numeric_limits<float>::quiet_NaN();
  }
  Radix::clear(shared);
  std::uint32_t keys[kOwn];
  std::uint32_t smallest = kWarp;
  std::uint32_t largest = 0;
  std::uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    keys[i] = ordered_bits(scores[i]);
    smallest = keys[i] != 0 ? min(smallest, keys[i]) : smallest;
    largest = max(largest, keys[i]);
    own += keys[i] != 0 ? 1 : 0;
  }
  const Bucket all = Radix::bracket_all(shared, smallest, largest, own);

  // Step 2.
  const std::uint32_t wanted = threshold_rank(all.count, length, top_k);
  if (all.count < wanted) {
    if (threadIdx.x == 0) {
      thresholds[t] = kAll;
    }
    return;
  }

  // Step 3. A sixteenth more samples than wanted may pass.
  const auto visit = [&](const auto& visitor) {
#pragma unroll
    for (const std::uint32_t key : keys) {
      visitor(key, true);
    }
  };
  const float threshold = find_gate_threshold<Radix>(shared, all, wanted, wanted + wanted / 16,
                                                     wanted + wanted / 2, visit);
  if (threadIdx.x == 0) {
    thresholds[t] = threshold;
  }
}

}  // namespace

void launch_threshold(const Samples& samples, const Keys& keys, std::int64_t rows, int top_k,
                      float* thresholds, const FallbackRows& fallback, void* stream) {
  const int threads = samples.columns <= 64 * kOwn ? 64 : static_cast<int>(kMaxSamples) / kOwn;
  auto* kernel = threads == 64 ? threshold_kernel<64> : threshold_kernel<kMaxSamples / kOwn>;
  launch_kernel("threshold", kernel, dim3(static_cast<unsigned>(rows)), threads, 0, stream, samples,
                keys, static_cast<std::uint32_t>(top_k), thresholds, fallback);
}

}  // namespace misa::cuda::select
