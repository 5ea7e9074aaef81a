// SPDX-License-Identifier: Apache-2.0
// Where the key of a wanted rank lies, by histograms of digits: for a thread block that visits its
// keys as often as it is asked to. "Visiting" is a function that calls its argument with
// (key, valid) for every key, in any order.
#pragma once

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "core/entry.hpp"
#include "cuda/warp.cuh"

namespace misa::cuda::select {

inline constexpr unsigned kWarp = 0xFFFFFFFFU;

// The key of the wanted rank, if there is one, is one of `count` in [low, low + reach]; `above`
// keys are larger.
struct Bucket {
  std::uint32_t low;
  std::uint32_t reach;
  std::uint32_t above;
  std::uint32_t count;
};

template <int threads, int bits>
struct RadixHistogram {
  static constexpr int kWarps = threads / 32;
  static constexpr int kBuckets = 1 << bits;
  static constexpr int kOwn = kBuckets / threads;  // bins of a thread
  static_assert(kOwn % 4 == 0);
  using Scan = cub::BlockScan<std::uint32_t, threads, cub::BLOCK_SCAN_WARP_SCANS>;

  struct Shared {
    alignas(16) std::uint32_t words[kBuckets];
    std::uint32_t smallest[kWarps];
    std::uint32_t largest[kWarps];
    std::uint32_t counts[kWarps];
    Bucket bin;
    typename Scan::TempStorage scan;
  };

  // Before all else; bracket_all brings the barrier that it needs.
  static __device__ void clear(Shared& shared) {
#pragma unroll
    for (int i = 0; i < kOwn / 4; ++i) {
      reinterpret_cast<uint4*>(shared.words)[i * threads + threadIdx.x] = uint4{0, 0, 0, 0};
    }
  }

  // A bucket of all keys, from each thread's smallest (kWarp if it has none) and largest (0), and
  // how many it has.
  static __device__ Bucket bracket_all(Shared& shared, std::uint32_t smallest,
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

  // One digit more: the bin of a bucket that holds rank `wanted` (from 1, the largest first). If
  // the bucket does not hold it, a bucket of no keys that has all of them above. A bin ends with
  // its bucket: what lies behind is counted among those above already.
  template <class Visit>
  static __device__ Bucket narrow(Shared& shared, const Bucket& bucket, std::uint32_t wanted,
                                  const Visit& visit) {
    const int shift = max(0, 32 - __clz(static_cast<int>(bucket.reach)) - bits);
    visit([&](std::uint32_t key, bool valid) {
      const std::uint32_t offset = key - bucket.low;
      if (valid && offset <= bucket.reach) {
        atomicAdd(&shared.words[offset >> shift], 1U);
      }
    });
    __syncthreads();

    // Thread 0 has the highest bins. They are left zero for the next digit.
    const std::uint32_t first = kBuckets - (threadIdx.x + 1) * kOwn;
    std::uint32_t counts[kOwn];
    std::uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn / 4; ++i) {
      uint4& four = reinterpret_cast<uint4*>(shared.words + first)[i];
      counts[4 * i] = four.x;
      counts[4 * i + 1] = four.y;
      counts[4 * i + 2] = four.z;
      counts[4 * i + 3] = four.w;
      four = uint4{0, 0, 0, 0};
      sum += counts[4 * i] + counts[4 * i + 1] + counts[4 * i + 2] + counts[4 * i + 3];
    }
    std::uint32_t above = 0;
    std::uint32_t total = 0;
    Scan(shared.scan).ExclusiveSum(sum, above, total);
    above += bucket.above;
    total += bucket.above;
    if (above < wanted && wanted <= above + sum) {
#pragma unroll
      for (int i = kOwn - 1; i >= 0; --i) {
        if (above < wanted && wanted <= above + counts[i]) {
          const std::uint32_t begin = (first + i) << shift;
          shared.bin = {bucket.low + begin, min((1U << shift) - 1, bucket.reach - begin), above,
                        counts[i]};
        }
        above += counts[i];
      }
    }
    if (threadIdx.x == 0 && total < wanted) {
      shared.bin = {bucket.low, 0, total, 0};
    }
    __syncthreads();
    return shared.bin;
  }
};

}  // namespace misa::cuda::select
