// SPDX-License-Identifier: Apache-2.0
// The k-th of the entries that a block visits, in the order of selection. "Visiting" is a function
// that calls its argument with (entry, valid) for every entry, in any order.
//
//  1. RadixHistogram of the scores (digits.cuh) narrow down where it lies, until the bin is wanted
//  whole,
//     holds few, or has one score.
//  2. On such a plateau the lower positions win: digits of the positions.
//  3. The few left are ranked directly.
#pragma once

#include <cstdint>

#include "core/entry.hpp"
#include "select/generic_config.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// The entry (entry.hpp) of rank `wanted` of `count` entries, 1 <= wanted <= count, of positions
// below `length`. Entries that repeat, or change between visits, give some entry; nothing worse.
template <class Visit>
__device__ std::uint64_t find_kth(Shared& shared, std::uint32_t count, std::uint32_t wanted,
                                  std::uint32_t length, const Visit& visit) {
  const auto key_of = [](std::uint64_t entry) { return static_cast<std::uint32_t>(entry >> 32); };
  const auto place_of = [](std::uint64_t entry) { return static_cast<std::uint32_t>(entry); };
  const auto narrowing = [&](const Bucket& bucket) {
    return bucket.above + bucket.count != wanted && bucket.count > kFew && bucket.reach != 0;
  };

  Radix::clear(shared.radix);
  std::uint32_t smallest = kWarp;
  std::uint32_t largest = 0;
  visit([&](std::uint64_t entry, bool valid) {
    smallest = valid ? min(smallest, key_of(entry)) : smallest;
    largest = valid ? max(largest, key_of(entry)) : largest;
  });
  Bucket keys = Radix::bracket_all(shared.radix, smallest, largest, threadIdx.x == 0 ? count : 0);
  while (narrowing(keys)) {  // step 1
    keys = Radix::narrow(shared.radix, keys, wanted, [&](const auto& visitor) {
      visit([&](std::uint64_t entry, bool valid) { visitor(key_of(entry), valid); });
    });
  }
  std::uint64_t first = std::uint64_t{keys.low} << 32;
  std::uint64_t reach = std::uint64_t{keys.reach} << 32 | kWarp;
  Bucket last = keys;
  if (keys.above + keys.count != wanted && keys.count > kFew) {  // step 2
    last = {~(length - 1), length - 1, keys.above, keys.count};
    while (narrowing(last)) {
      last = Radix::narrow(shared.radix, last, wanted, [&](const auto& visitor) {
        visit([&](std::uint64_t entry, bool valid) {
          visitor(place_of(entry), valid && key_of(entry) == keys.low);
        });
      });
    }
    first |= last.low;
    reach = last.reach;
  }
  if (last.above + last.count == wanted) {
    return first;
  }

  if (threadIdx.x == 0) {  // step 3
    shared.few_count = 0;
    shared.cut = first;
  }
  __syncthreads();
  visit([&](std::uint64_t entry, bool valid) {
    if (valid && entry - first <= reach) {
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
    std::uint32_t rank = last.above + 1;
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
