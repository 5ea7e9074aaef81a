// SPDX-License-Identifier: Apache-2.0
// Step 3 of survivors.cu: finds the range of keys around the k-th candidate. `Config` is that of
// survivors.cu.
#pragma once

#include <cstdint>

#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// Keys are those of candidate_key until order_by_position replaces them. Candidates with keys above
// `high` are selected, and `quota` of those with keys in [low, high]: larger keys first, of equal
// keys lower positions first.
struct KthRange {
  std::uint32_t low;
  std::uint32_t high;
  std::uint32_t quota;
  bool by_position;  // whether order_by_position has replaced the candidates' keys
};

// The range for the candidate of rank `rank` of `count` candidates, of positions below `length`. If
// its quota is not 0, it holds at most Config::kThreads candidates.
template <class Config, class Source>
__device__ KthRange find_kth_range(typename Config::Shared& shared, Source& candidates,
                                   std::uint32_t count, std::uint32_t rank, std::uint32_t length) {
  using Radix = typename Config::Radix;
  std::uint32_t smallest = kLargestKey;
  std::uint32_t largest = 0;
  candidates.visit([&](std::uint32_t key, std::uint32_t) {
    smallest = key != 0 ? min(smallest, key) : smallest;
    largest = max(largest, key);
  });
  Bucket bucket =
      Radix::initial_bucket(shared.radix, smallest, largest, threadIdx.x == 0 ? count : 0);
  bool by_position = false;
  while (bucket.count > Config::kThreads && bucket.above + bucket.count != rank &&
         (bucket.range != 0 || !by_position)) {
    if (bucket.range == 0) {
      candidates.order_by_position(bucket.low, length);
      by_position = true;
      bucket = {1, length - 1, bucket.above, bucket.count};
    }
    bucket = Radix::choose_bucket(shared.radix, bucket, rank, [&](const auto& visitor) {
      candidates.visit([&](std::uint32_t key, std::uint32_t) { visitor(key, true); });
    });
  }
  if (bucket.above + bucket.count == rank) {
    return {bucket.low, bucket.low - 1, 0, by_position};
  }
  return {bucket.low, bucket.low + bucket.range, rank - bucket.above, by_position};
}

}  // namespace misa::cuda::select
