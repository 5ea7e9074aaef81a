// SPDX-License-Identifier: Apache-2.0
// A gate threshold for each row from a sample of its scores: one small thread block per row, the
// sample in registers.
//
//  1. Samples become integers in the order of the scores, called keys below (ordered_bits,
//     entry.hpp). NaN, whose key is 0, is not counted as a sample.
//  2. The threshold's rank in the sample follows from the row's length and the number of its
//     samples (gate_rank.hpp).
//  3. Radix histograms of the keys narrow down the bucket that holds that rank
//     (gate_threshold.cuh), until a threshold below it lets only a few more samples pass.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "select/gate.hpp"
#include "select/gate_rank.hpp"
#include "select/gate_threshold.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {
namespace {

constexpr int kThreadSamples = 32;

constexpr int kBucketBits = 9;  // 128 buckets an octave in the first pass (gate_threshold.cuh)

template <int threads>
__global__ void __launch_bounds__(threads)
    threshold_kernel(const Samples samples, const DeviceRaggedSource visible_keys,
                     const std::uint32_t top_k, float* thresholds, const FallbackRows fallback) {
  begin_kernel();
  using Radix = RadixHistogram<threads, kBucketBits>;
  __shared__ typename Radix::Shared shared;
  const std::int64_t t = blockIdx.x;
  if (threadIdx.x == 0) {
    fallback.finished_splits[t] = 0;
    if (t == 0) {
      *fallback.count = 0;
    }
  }
  constexpr float kAllPass = -std::numeric_limits<float>::infinity();
  const auto length = static_cast<std::uint32_t>(visible(visible_keys, t).length);
  if (length <= top_k) {
    if (threadIdx.x == 0) {
      thresholds[t] = kAllPass;
    }
    return;
  }

  // Step 1.
  const float* row = samples.scores + t * samples.stride;
  float scores[kThreadSamples];
#pragma unroll
  for (int i = 0; i < kThreadSamples; ++i) {
    const std::uint32_t column = i * threads + threadIdx.x;
    scores[i] = column < samples.columns ? row[column] : std::numeric_limits<float>::quiet_NaN();
  }
  Radix::clear(shared);
  std::uint32_t keys[kThreadSamples];
  std::uint32_t smallest = kLargestKey;
  std::uint32_t largest = 0;
  std::uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < kThreadSamples; ++i) {
    keys[i] = ordered_bits(scores[i]);
    smallest = keys[i] != 0 ? min(smallest, keys[i]) : smallest;
    largest = max(largest, keys[i]);
    count += keys[i] != 0 ? 1 : 0;
  }
  const Bucket all = Radix::initial_bucket(shared, smallest, largest, count);

  // Step 2.
  const std::uint32_t rank = threshold_rank<float>(all.count, length, top_k);
  if (all.count < rank) {
    if (threadIdx.x == 0) {
      thresholds[t] = kAllPass;
    }
    return;
  }

  // Step 3. Up to a sixteenth more samples may pass, and half more if they are tied.
  const auto visit = [&](const auto& visitor) {
#pragma unroll
    for (const std::uint32_t key : keys) {
      visitor(key, true);
    }
  };
  const float threshold =
      find_gate_threshold<Radix>(shared, all, rank, rank + rank / 16, rank + rank / 2, visit);
  if (threadIdx.x == 0) {
    thresholds[t] = threshold;
  }
}

}  // namespace

void launch_threshold(const Samples& samples, const DeviceRaggedSource& keys, std::int64_t rows,
                      int top_k, float* thresholds, const FallbackRows& fallback, void* stream) {
  const int threads = samples.columns <= 64 * kThreadSamples
                          ? 64
                          : static_cast<int>(kMaxGateSamples) / kThreadSamples;
  auto* kernel =
      threads == 64 ? threshold_kernel<64> : threshold_kernel<kMaxGateSamples / kThreadSamples>;
  launch_kernel("threshold", kernel, dim3(static_cast<unsigned>(rows)), threads, 0, stream, samples,
                keys, static_cast<std::uint32_t>(top_k), thresholds, fallback);
}

}  // namespace misa::cuda::select
