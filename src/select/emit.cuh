// SPDX-License-Identifier: Apache-2.0
// Writes a row of output: all entries from the k-th one on, in ascending order of position. For
// each window of kWindow positions:
//
//  1. The selected positions are marked in a bitmap.
//  2. A scan over its words gives every selected position its rank.
//  3. Positions go to their ranks in shared memory, and from there to the output in whole lines.
//  4. Scores, if requested, go directly to the output: an entry's rank is looked up by its
//     position.
#pragma once

#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "select/generic_config.cuh"
#include "select/output.cuh"

namespace misa::cuda::select {

// Fills the output from `count` to top_k: -1, and -inf for scores.
__device__ inline void pad(const OutputRow& out, std::uint32_t count, std::uint32_t top_k) {
  for (std::uint32_t i = count + threadIdx.x; i < top_k; i += kThreads) {
    out.indices[i] = -1;
    if (out.scores != nullptr) {
      out.scores[i] = -std::numeric_limits<float>::infinity();
    }
  }
}

// Writes the selected entries of the positions from `begin` up to `end` behind the `written` first
// outputs, and returns how many are written then. source.visit(first, last, visitor) must visit at
// least the entries with first <= position < last. At most top_k outputs are written, whatever the
// entries are.
template <class Source>
__device__ std::uint32_t emit_range(Shared& shared, std::uint16_t* staged, const Source& source,
                                    std::uint64_t kth_entry, std::uint32_t begin, std::uint32_t end,
                                    std::uint32_t written, std::uint32_t top_k,
                                    const OutputRow& out) {
  for (std::uint32_t first = begin; first < end && written < top_k; first += kWindow) {
    const std::uint32_t window = min(end - first, std::uint32_t{kWindow});
    // Steps 1 and 4 visit the same entries: those selected in this window.
    const auto visit_selected = [&](const auto& visitor) {
      source.visit(first, first + window, [&](std::uint64_t entry, bool valid) {
        const std::uint32_t offset = entry_position(entry) - first;
        if (valid && entry >= kth_entry && offset < window) {
          visitor(entry, offset);
        }
      });
    };
    for (int i = threadIdx.x; i < Radix::kBuckets; i += kThreads) {
      shared.radix.histogram[i] = 0;
    }
    __syncthreads();
    visit_selected([&](std::uint64_t, std::uint32_t offset) {
      atomicOr(&shared.radix.histogram[offset / 32], 1U << offset % 32);
    });
    __syncthreads();

    const uint4 vector = reinterpret_cast<const uint4*>(shared.radix.histogram)[threadIdx.x];
    const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    std::uint32_t selected = 0;
#pragma unroll
    for (const std::uint32_t word : words) {
      selected += static_cast<std::uint32_t>(__popc(word));
    }
    std::uint32_t rank = 0;
    std::uint32_t total = 0;
    Radix::Scan(shared.radix.scan).ExclusiveSum(selected, rank, total);
    const std::uint32_t room = top_k - written;
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
      out.indices[written + i] = static_cast<std::int32_t>(first + staged[i]);
    }
    if (out.scores != nullptr) {
      visit_selected([&](std::uint64_t entry, std::uint32_t offset) {
        const std::uint32_t word = offset / 32;
        const std::uint32_t slot =
            shared.ranks[word] + __popc(shared.radix.histogram[word] & ((1U << offset % 32) - 1));
        if (slot < room) {
          out.scores[written + slot] = entry_score(entry);
        }
      });
    }
    written += count;
    __syncthreads();
  }
  return written;
}

// The same for a whole row, and its padding.
template <class Source>
__device__ void emit(Shared& shared, std::uint16_t* staged, const Source& source,
                     std::uint64_t kth_entry, std::uint32_t length, std::uint32_t top_k,
                     const OutputRow& out) {
  pad(out, emit_range(shared, staged, source, kth_entry, 0, length, 0, top_k, out), top_k);
}

}  // namespace misa::cuda::select
