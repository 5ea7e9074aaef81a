// SPDX-License-Identifier: Apache-2.0
// The k-th entry, in the order of selection, of those that a thread block visits. A "visit"
// function passes (entry, valid) of every entry to its argument, in any order.
//
//  1. Radix histograms of the scores (radix_histogram.cuh) find the bucket that holds the k-th
//     entry, until all its entries are selected, it holds few, or it has a single score.
//  2. Of tied scores the lower positions are selected: radix histograms of the positions.
//  3. The few entries left are ranked directly.
#pragma once

#include <cstdint>

#include "core/entry.hpp"
#include "select/generic_config.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// The entry (entry.hpp) of rank `rank` of `count` entries, 1 <= rank <= count, of positions below
// `length`; or a value between it and the next lower entry, from which on the same entries are
// selected. If entries repeat or change between visits, the result is some entry.
template <class Visit>
__device__ std::uint64_t find_kth_entry(Shared& shared, std::uint32_t count, std::uint32_t rank,
                                        std::uint32_t length, const Visit& visit) {
  // The two halves of an entry; entries with a larger one are selected first.
  const auto score_key = [](std::uint64_t entry) {
    return static_cast<std::uint32_t>(entry >> 32);
  };
  const auto position_key = [](std::uint64_t entry) { return static_cast<std::uint32_t>(entry); };
  const auto undecided = [&](const Bucket& bucket) {
    return bucket.above + bucket.count != rank && bucket.count > kMaxRanked && bucket.range != 0;
  };

  Radix::clear(shared.radix);
  std::uint32_t smallest = kLargestKey;
  std::uint32_t largest = 0;
  visit([&](std::uint64_t entry, bool valid) {
    smallest = valid ? min(smallest, score_key(entry)) : smallest;
    largest = valid ? max(largest, score_key(entry)) : largest;
  });
  Bucket scores =
      Radix::initial_bucket(shared.radix, smallest, largest, threadIdx.x == 0 ? count : 0);
  while (undecided(scores)) {  // step 1
    scores = Radix::choose_bucket(shared.radix, scores, rank, [&](const auto& visitor) {
      visit([&](std::uint64_t entry, bool valid) { visitor(score_key(entry), valid); });
    });
  }
  // The entries of the last bucket are [low, low + range].
  std::uint64_t low = std::uint64_t{scores.low} << 32;
  std::uint64_t range = std::uint64_t{scores.range} << 32 | kLargestKey;
  Bucket last = scores;
  if (scores.above + scores.count != rank && scores.count > kMaxRanked) {  // step 2
    last = {~(length - 1), length - 1, scores.above, scores.count};
    while (undecided(last)) {
      last = Radix::choose_bucket(shared.radix, last, rank, [&](const auto& visitor) {
        visit([&](std::uint64_t entry, bool valid) {
          visitor(position_key(entry), valid && score_key(entry) == scores.low);
        });
      });
    }
    low |= last.low;
    range = last.range;
  }
  if (last.above + last.count == rank) {
    return low;
  }

  if (threadIdx.x == 0) {  // step 3
    shared.ranked_count = 0;
    shared.kth_entry = low;
  }
  __syncthreads();
  visit([&](std::uint64_t entry, bool valid) {
    if (valid && entry - low <= range) {
      const std::uint32_t slot = atomicAdd(&shared.ranked_count, 1U);
      if (slot < kMaxRanked) {
        shared.ranked[slot] = entry;
      }
    }
  });
  __syncthreads();
  const std::uint32_t ranked = min(shared.ranked_count, std::uint32_t{kMaxRanked});
  if (threadIdx.x < ranked) {
    const std::uint64_t entry = shared.ranked[threadIdx.x];
    std::uint32_t entry_rank = last.above + 1;
    for (std::uint32_t i = 0; i < ranked; ++i) {
      entry_rank += shared.ranked[i] > entry ? 1 : 0;
    }
    if (entry_rank == rank) {
      shared.kth_entry = entry;
    }
  }
  __syncthreads();
  return shared.kth_entry;
}

}  // namespace misa::cuda::select
