// SPDX-License-Identifier: Apache-2.0
// Writes a row of output: all entries from a cut on, in ascending order of position.
//
//  1. A window of positions becomes a bitmap of those selected.
//  2. A scan over its words gives every selected position its rank.
//  3. Positions go to their ranks in shared memory, from there to the output in whole lines.
//  4. Scores, if wanted, are looked up the other way: from an entry's position its rank.
#pragma once

#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "select/generic_config.cuh"
#include "select/output.cuh"

namespace misa::cuda::select {

// What follows the selected: [count, top_k).
__device__ inline void pad(const OutputRow& out, std::uint32_t count, std::uint32_t top_k) {
  for (std::uint32_t i = count + threadIdx.x; i < top_k; i += kThreads) {
    out.indices[i] = -1;
    if (out.scores != nullptr) {
      out.scores[i] = -std::numeric_limits<float>::infinity();
    }
  }
}

// source.visit(first, last, visitor) visits, at least, the entries with first <= position < last.
// Whatever the entries are, no more than top_k places are written.
template <class Source>
__device__ void emit(Shared& shared, std::uint16_t* staged, const Source& source, std::uint64_t cut,
                     std::uint32_t length, std::uint32_t top_k, const OutputRow& out) {
  std::uint32_t placed = 0;
  for (std::uint32_t first = 0; first < length && placed < top_k; first += kWindow) {
    // Steps 1 and 4 look at the same entries: those selected in this window.
    const auto visit_selected = [&](const auto& visitor) {
      source.visit(first, first + kWindow, [&](std::uint64_t entry, bool valid) {
        const std::uint32_t offset = entry_position(entry) - first;
        if (valid && entry >= cut && offset < kWindow) {
          visitor(entry, offset);
        }
      });
    };
    for (int i = threadIdx.x; i < Radix::kBuckets; i += kThreads) {
      shared.radix.words[i] = 0;
    }
    __syncthreads();
    visit_selected([&](std::uint64_t, std::uint32_t offset) {
      atomicOr(&shared.radix.words[offset / 32], 1U << offset % 32);
    });
    __syncthreads();

    const uint4 four = reinterpret_cast<const uint4*>(shared.radix.words)[threadIdx.x];
    const std::uint32_t words[4] = {four.x, four.y, four.z, four.w};
    std::uint32_t own = 0;
#pragma unroll
    for (const std::uint32_t word : words) {
      own += static_cast<std::uint32_t>(__popc(word));
    }
    std::uint32_t rank = 0;
    std::uint32_t total = 0;
    Radix::Scan(shared.radix.scan).ExclusiveSum(own, rank, total);
    const std::uint32_t room = top_k - placed;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t word = threadIdx.x * 4 + i;
      shared.ranks[word] = static_cast<std::uint16_t>(rank);
      for (std::uint32_t bits = words[i]; bits != 0 && rank < room; bits &= bits - 1) {
        const std::uint32_t bit = __ffs(static_cast<int>(bits)) - 1;
        staged[rank++] = static_cast<std::uint16_t>(word * 32 + bit);
      }
    }
    __syncthreads();

    const std::uint32_t count = min(total, room);
    for (std::uint32_t i = threadIdx.x; i < count; i += kThreads) {
      out.indices[placed + i] = static_cast<std::int32_t>(first + staged[i]);
    }
    if (out.scores != nullptr) {
      visit_selected([&](std::uint64_t entry, std::uint32_t offset) {
        const std::uint32_t word = offset / 32;
        const std::uint32_t place =
            shared.ranks[word] + __popc(shared.radix.words[word] & ((1U << offset % 32) - 1));
        if (place < room) {
          out.scores[placed + place] = entry_score(entry);
        }
      });
    }
    placed += count;
    __syncthreads();
  }
  pad(out, placed, top_k);
}

}  // namespace misa::cuda::select
