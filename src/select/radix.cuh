// The k-th largest of the keys that a block visits. "Visiting" is a function that calls its
// argument with (key, valid) for every key, all lanes of a warp together, in any order.
//
//  1. The range of the keys, so that no digit is spent on bits that all of them share.
//  2. A histogram of the next 11 bits inside the range; the bin that holds the wanted rank is the
//     next range. Repeat until it is wanted whole or holds few.
//  3. Those few are ranked directly.
#pragma once

#include <cstdint>

#include "select/entry.hpp"
#include "select/generic_config.cuh"

namespace misa::cuda::select {

inline constexpr unsigned kWarp = 0xFFFFFFFFU;

// The key of the wanted rank is one of `count` in [low, low + reach]; `above` keys are larger.
template <class Key>
struct Bracket {
  Key low;
  Key reach;
  std::uint32_t above;
  std::uint32_t count;
};

__device__ inline int bit_width(std::uint32_t value) { return 32 - __clz(static_cast<int>(value)); }
__device__ inline int bit_width(std::uint64_t value) {
  return 64 - __clzll(static_cast<long long>(value));
}

// Adds a digit to the histogram; every lane of the warp calls. A digit that a plateau gives to most
// lanes is added once, where it would be 32 conflicting additions.
__device__ inline void count_digit(std::uint32_t* histogram, std::uint32_t digit, bool valid) {
  const std::uint32_t first = __shfl_sync(kWarp, digit, 0);
  const std::uint32_t same = __ballot_sync(kWarp, valid && digit == first);
  if (threadIdx.x % 32 == 0 && same != 0) {
    atomicAdd(&histogram[first], static_cast<std::uint32_t>(__popc(same)));
  }
  if (valid && digit != first) {
    atomicAdd(&histogram[digit], 1U);
  }
}

// The bin of the histogram that holds rank `wanted` (from 1, the largest first).
__device__ inline Bin find_bin(Shared& shared, std::uint32_t wanted) {
  const std::uint32_t top = kBins - 1 - threadIdx.x * kBinsPerThread;
  std::uint32_t counts[kBinsPerThread];
  std::uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    counts[i] = shared.words[top - i];
    sum += counts[i];
  }
  std::uint32_t above = 0;
  Scan(shared.scan).ExclusiveSum(sum, above);
  if (above < wanted && wanted <= above + sum) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above < wanted && wanted <= above + counts[i]) {
        shared.bin = {top - i, above, counts[i]};
      }
      above += counts[i];
    }
  }
  __syncthreads();
  return shared.bin;
}

// Step 1: a bracket of 32-bit keys that holds all `count` of them.
template <class Visit>
__device__ Bracket<std::uint32_t> bracket_all(Shared& shared, std::uint32_t count,
                                              const Visit& visit) {
  if (threadIdx.x == 0) {
    shared.smallest = kWarp;
    shared.largest = 0;
  }
  __syncthreads();
  std::uint32_t smallest = kWarp;
  std::uint32_t largest = 0;
  visit([&](std::uint32_t key, bool valid) {
    smallest = valid ? min(smallest, key) : smallest;
    largest = valid ? max(largest, key) : largest;
  });
  smallest = __reduce_min_sync(kWarp, smallest);
  largest = __reduce_max_sync(kWarp, largest);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&shared.smallest, smallest);
    atomicMax(&shared.largest, largest);
  }
  __syncthreads();
  return {shared.smallest, shared.largest - shared.smallest, 0, count};
}

// Step 2: one digit. The bracket's upper end may lie beyond the largest possible key; what that
// wraps to lies below the first bracket's low, where there are no keys.
template <class Key, class Visit>
__device__ Bracket<Key> narrow(Shared& shared, const Bracket<Key>& bracket, std::uint32_t wanted,
                               const Visit& visit) {
  const int shift = max(0, bit_width(bracket.reach) - kDigitBits);
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    shared.words[i] = 0;
  }
  __syncthreads();
  visit([&](Key key, bool valid) {
    const Key offset = key - bracket.low;
    count_digit(shared.words, static_cast<std::uint32_t>(offset >> shift),
                valid && offset <= bracket.reach);
  });
  __syncthreads();
  const Bin bin = find_bin(shared, wanted - bracket.above);
  return {bracket.low + (Key{bin.digit} << shift), (Key{1} << shift) - 1, bracket.above + bin.above,
          bin.count};
}

// The entry (entry.hpp) of rank `wanted` of `count` entries, 1 <= wanted <= count. Entries that
// repeat, or change between visits, give some entry; nothing worse.
template <class Visit>
__device__ std::uint64_t select_entry(Shared& shared, std::uint32_t count, std::uint32_t wanted,
                                      const Visit& visit) {
  const Bracket<std::uint32_t> keys = bracket_all(shared, count, [&](const auto& visitor) {
    visit([&](std::uint64_t entry, bool valid) {
      visitor(static_cast<std::uint32_t>(entry >> 32), valid);
    });
  });
  Bracket<std::uint64_t> bracket{std::uint64_t{keys.low} << 32,
                                 std::uint64_t{keys.reach} << 32 | 0xFFFFFFFFU, 0, count};
  const auto whole = [&] { return bracket.above + bracket.count == wanted || bracket.reach == 0; };
  while (!whole() && bracket.count > kFew) {
    bracket = narrow(shared, bracket, wanted, visit);
  }
  if (whole()) {
    return bracket.low;
  }

  // Step 3.
  if (threadIdx.x == 0) {
    shared.few_count = 0;
    shared.cut = bracket.low;
  }
  __syncthreads();
  visit([&](std::uint64_t entry, bool valid) {
    if (valid && entry - bracket.low <= bracket.reach) {
      const std::uint32_t place = atomicAdd(&shared.few_count, 1U);
      if (place < kFew) {
        shared.few[place] = entry;
      }
    }
  });
  __syncthreads();
  const std::uint32_t few = min(shared.few_count, std::uint32_t{kFew});
  if (threadIdx.x < few) {
    const std::uint64_t entry = shared.few[threadIdx.x];
    std::uint32_t rank = bracket.above + 1;
    for (std::uint32_t i = 0; i < few; ++i) {
      rank += shared.few[i] > entry ? 1 : 0;
    }
    if (rank == wanted) {
      shared.cut = entry;
    }
  }
  __syncthreads();
  return shared.cut;
}

}  // namespace misa::cuda::select
