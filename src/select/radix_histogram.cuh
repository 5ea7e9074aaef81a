// SPDX-License-Identifier: Apache-2.0
// Radix select by one thread block: each pass makes a histogram of some bits of the keys and
// chooses the bucket that holds the key of a given rank. A "visit" function passes (key, valid) of
// every key to its argument, in any order; it is called once per pass. Here, keys are the integers
// to select from, such as ordered_bits of scores (entry.hpp), not attention keys.
#pragma once

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "core/entry.hpp"
#include "cuda/warp.cuh"

namespace misa::cuda::select {

inline constexpr std::uint32_t kLargestKey = 0xFFFFFFFFU;

// Keys in [low, low + range].
struct Bucket {
  std::uint32_t low;
  std::uint32_t range;
  std::uint32_t above;  // how many keys are larger than low + range
  std::uint32_t count;  // how many keys the bucket holds
};

template <int threads, int bits>
struct RadixHistogram {
  static constexpr int kWarps = threads / 32;
  static constexpr int kBuckets = 1 << bits;
  static constexpr int kThreadBuckets = kBuckets / threads;
  static_assert(kThreadBuckets % 4 == 0);
  using Scan = cub::BlockScan<std::uint32_t, threads, cub::BLOCK_SCAN_WARP_SCANS>;

  struct Shared {
    alignas(16) std::uint32_t histogram[kBuckets];  // all zero between passes
    std::uint32_t smallest[kWarps];
    std::uint32_t largest[kWarps];
    std::uint32_t counts[kWarps];
    Bucket chosen;
    typename Scan::TempStorage scan;
  };

  // Must be called before initial_bucket, whose barrier makes the zeros visible to the first pass.
  static __device__ void clear(Shared& shared) {
#pragma unroll
    for (int i = 0; i < kThreadBuckets / 4; ++i) {
      reinterpret_cast<uint4*>(shared.histogram)[i * threads + threadIdx.x] = uint4{0, 0, 0, 0};
    }
  }

  // The bucket of all keys. Each thread passes the smallest (kLargestKey if it has none) and the
  // largest (0) of its keys, and their number.
  static __device__ Bucket initial_bucket(Shared& shared, std::uint32_t smallest,
                                          std::uint32_t largest, std::uint32_t count) {
    smallest = __reduce_min_sync(kFullMask, smallest);
    largest = __reduce_max_sync(kFullMask, largest);
    count = __reduce_add_sync(kFullMask, count);
    if (threadIdx.x % 32 == 0) {
      shared.smallest[threadIdx.x / 32] = smallest;
      shared.largest[threadIdx.x / 32] = largest;
      shared.counts[threadIdx.x / 32] = count;
    }
    __syncthreads();
    const unsigned lane = threadIdx.x % 32;
    const unsigned warp = lane % kWarps;
    smallest = __reduce_min_sync(kFullMask, shared.smallest[warp]);
    largest = __reduce_max_sync(kFullMask, shared.largest[warp]);
    count = __reduce_add_sync(kFullMask, lane < kWarps ? shared.counts[lane] : 0);
    return {smallest, largest - smallest, 0, count};
  }

  // One pass: divides `bucket` and returns the part that holds the key of rank `rank` (from 1, the
  // largest key first). If the bucket does not hold that rank, returns an empty bucket whose
  // `above` includes all keys of `bucket`.
  template <class Visit>
  static __device__ Bucket choose_bucket(Shared& shared, const Bucket& bucket, std::uint32_t rank,
                                         const Visit& visit) {
    const int shift = max(0, 32 - __clz(static_cast<int>(bucket.range)) - bits);
    visit([&](std::uint32_t key, bool valid) {
      const std::uint32_t offset = key - bucket.low;
      if (valid && offset <= bucket.range) {
        atomicAdd(&shared.histogram[offset >> shift], 1U);
      }
    });
    __syncthreads();

    // Thread 0 reads the highest buckets, so that the scan counts larger keys.
    const std::uint32_t first = kBuckets - (threadIdx.x + 1) * kThreadBuckets;
    std::uint32_t counts[kThreadBuckets];
    std::uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kThreadBuckets / 4; ++i) {
      uint4& vector = reinterpret_cast<uint4*>(shared.histogram + first)[i];
      counts[4 * i] = vector.x;
      counts[4 * i + 1] = vector.y;
      counts[4 * i + 2] = vector.z;
      counts[4 * i + 3] = vector.w;
      vector = uint4{0, 0, 0, 0};
      sum += counts[4 * i] + counts[4 * i + 1] + counts[4 * i + 2] + counts[4 * i + 3];
    }
    std::uint32_t above = 0;
    std::uint32_t total = 0;
    Scan(shared.scan).ExclusiveSum(sum, above, total);
    above += bucket.above;
    total += bucket.above;
    if (above < rank && rank <= above + sum) {
#pragma unroll
      for (int i = kThreadBuckets - 1; i >= 0; --i) {
        if (above < rank && rank <= above + counts[i]) {
          // The last part ends where `bucket` does: larger keys are counted in `above` already.
          const std::uint32_t begin = (first + i) << shift;
          shared.chosen = {bucket.low + begin, min((1U << shift) - 1, bucket.range - begin), above,
                           counts[i]};
        }
        above += counts[i];
      }
    }
    if (threadIdx.x == 0 && total < rank) {
      shared.chosen = {bucket.low, 0, total, 0};
    }
    __syncthreads();
    return shared.chosen;
  }
};

}  // namespace misa::cuda::select
