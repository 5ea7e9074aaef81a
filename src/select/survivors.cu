// SPDX-License-Identifier: Apache-2.0
// Exact top-k of the candidates that passed a row's gate threshold: one thread block per row.
//
//  1. A row of no more than k keys selects all of them, for which it needs candidates only if
//     scores are requested.
//  2. The warps share the lists of candidates in chunks. A row whose lists overflowed, or that has
//     too few candidates, becomes a fallback row. Candidates are held in registers and, if these do
//     not suffice, in spare shared memory; if that does not suffice either, every later step
//     rereads all of them from the lists (survivors_candidates.cuh).
//  3. Radix histograms of the scores find the bucket of the candidate of rank k, until few
//     candidates are left. If too many are tied, radix histograms of their positions follow
//     (survivors_kth.cuh).
//  4. Candidates above the bucket are selected: marked in a bitmap of positions. Those in it are
//     ranked directly, and marked if selected. If a row is longer than the bitmap, windows of
//     positions are marked and ranked one after the other.
//  5. A scan over the bitmap's words gives every selected position its rank. Positions go to their
//     ranks in shared memory, and scores, if requested, after them; from there they go to the
//     output in whole lines (survivors_output.cuh).
//
// No decision, and so no output, depends on the order of candidates.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "select/gate.hpp"
#include "select/output.cuh"
#include "select/radix_histogram.cuh"
#include "select/survivors_candidates.cuh"
#include "select/survivors_kth.cuh"
#include "select/survivors_output.cuh"

namespace misa::cuda::select {
namespace {

// The most positions that a bitmap covers: 32 KB, and 16 KB for ranks, so that two thread blocks
// share an SM.
constexpr std::uint32_t kMaxPositions = 1U << 18;

// Shared memory for `entries` candidates of each thread, as keys and positions.
template <int entries, int threads>
struct Spare {
  uint2 memory[entries][threads];
  __device__ uint2 (*rows())[threads] { return memory; }
};
template <int threads>
struct Spare<0, threads> {
  __device__ uint2 (*rows())[threads] { return nullptr; }
};

// How a thread block selects a row: each of `threads` threads holds 2 * slots candidates in
// registers, with positions of `position_bits` bits, and `spare_entries` more in shared memory;
// `blocks_per_sm` thread blocks must fit the registers of an SM. `windows`: rows may be longer than
// the bitmap.
template <int threads, int slots, int blocks_per_sm, int position_bits, int spare_entries = 0,
          bool windows = false>
struct SurvivorsConfig {
  static constexpr int kThreads = threads;
  static constexpr int kWarps = threads / 32;
  static constexpr int kSlots = slots;
  static constexpr int kBlocksPerSm = blocks_per_sm;
  static constexpr int kPositionBits = position_bits;
  static constexpr int kSpareEntries = spare_entries;
  static constexpr bool kWindows = windows;
  // Four buckets per thread: a pass of 10 or 11 bits leaves 5 to 70 of a few thousand scores in a
  // narrow range.
  using Radix = RadixHistogram<threads, std::bit_width(4U * threads) - 1>;

  // The fixed part of shared memory.
  struct Shared {
    typename Radix::Shared radix;
    [[no_unique_address]] Spare<spare_entries, threads> spare;
    std::uint64_t ranked[threads];  // candidates that are ranked directly
    std::uint32_t ranked_count;
  };

  // A launch, and the layout of its shared memory: Shared, and the arrays of OutputStage in their
  // order.
  struct Plan {
    std::uint32_t top_k;
    std::uint32_t positions;  // that the bitmap covers
    bool empty;               // whether rows of no keys are written

    Plan(int k, std::int64_t longest_row, bool write_empty)
        : top_k(static_cast<std::uint32_t>(k)), empty(write_empty) {
      constexpr std::uint32_t kStep = 32 * 4 * threads;  // four words of the bitmap per thread
      const std::int64_t covered = std::min<std::int64_t>(longest_row, kMaxPositions);
      const auto steps = static_cast<std::uint32_t>((covered + kStep - 1) / kStep);
      positions = std::max(steps, std::uint32_t{1}) * kStep;
    }
    std::size_t bytes(bool scores) const {
      return sizeof(Shared) +
             positions / 32 * (sizeof(*OutputStage::bitmap) + sizeof(*OutputStage::ranks)) +
             top_k *
                 (sizeof(*OutputStage::indices) + (scores ? sizeof(*OutputStage::score_keys) : 0));
    }
    __device__ OutputStage stage(std::byte* memory) const {
      const std::uint32_t words = positions / 32;
      auto* bitmap = reinterpret_cast<std::uint32_t*>(memory + sizeof(Shared));
      auto* ranks = reinterpret_cast<std::uint16_t*>(bitmap + words);
      auto* indices = reinterpret_cast<std::uint32_t*>(ranks + words);
      return {positions, bitmap, ranks, indices, indices + top_k};
    }
  };
};

template <class Config, bool scores>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    survivors_kernel(const Candidates candidates, const DeviceRaggedSource keys,
                     const typename Config::Plan plan, const TopK out,
                     const FallbackRows fallback) {
  begin_kernel();
  constexpr int kThreads = Config::kThreads;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(memory);
  const OutputStage stage = plan.stage(memory);

  const std::int64_t t = blockIdx.x;
  const CandidateChunks chunks(candidates, t);
  const Range range = visible(keys, t);
  const auto length = static_cast<std::uint32_t>(range.length);
  const OutputRow output = output_row(out, t, plan.top_k);
  const std::uint32_t selected = min(plan.top_k, length);
  const auto write = [&](std::uint32_t count, const auto& index_of) {
    for (std::uint32_t i = threadIdx.x; i < plan.top_k; i += kThreads) {
      output.indices[i] = i < count ? static_cast<std::int32_t>(index_of(i)) : -1;
    }
  };
  if (length == 0 && !plan.empty) {
    return;
  }
  if (length == 0 || (length <= plan.top_k && !scores)) {  // step 1
    write(length, [](std::uint32_t i) { return i; });
    if constexpr (scores) {
      for (std::uint32_t i = threadIdx.x; i < plan.top_k; i += kThreads) {
        output.scores[i] = -std::numeric_limits<float>::infinity();
      }
    }
    return;
  }
  if (chunks.overflowed || chunks.total < selected) {  // step 2
    if (threadIdx.x == 0) {
      fallback.rows[atomicAdd(fallback.count, 1U)] = static_cast<std::int32_t>(t);
    }
    return;
  }

  Config::Radix::clear(shared.radix);
  clear_bitmap<kThreads>(stage);
  if (threadIdx.x == 0) {
    shared.ranked_count = 0;
  }
  // Constructed only where needed, which is seldom: if kept, it would take registers from
  // candidates.
  const auto reread = [&] {
    return RereadCandidates<Config>(CandidateChunks(candidates, t), range);
  };
  std::uint32_t count = 0;
  const auto select = [&](auto source) {
    const KthRange kth = find_kth_range<Config>(shared, source, chunks.total, selected, length);
    count = stage_output<Config, scores>(shared, stage, source, kth, length, reread);
  };
  // The unlikely branch comes last in the code: placed first, it made all rows up to a tenth
  // slower.
  using Registers = RegisterCandidates<Config>;
  if (chunks.count > Registers::kChunks + Registers::kSpareChunks) [[unlikely]] {
    select(reread());
  } else {
    select(Registers(chunks, range, 0, shared.spare.rows()));
  }

  write(count, [&](std::uint32_t i) { return stage.indices[i]; });
  if constexpr (scores) {
    for (std::uint32_t i = threadIdx.x; i < plan.top_k; i += kThreads) {
      output.scores[i] =
          i < count ? score_of_bits(stage.score_keys[i]) : -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace

// The gate lets through about 3400 candidates for k = 2048 of 64K keys, 3900 of 128K, 4900 of 256K
// and 6400 of 1M, 5900 for k = 4096 of 64K and 10600 for k = 8192, with a standard deviation of 5
// to 18 %; the last chunk of each list is partly filled. Three things make this fast: several rows
// per SM, and so few registers per row; many threads to scan a long bitmap; and enough room for
// candidates, since rereading one of the last rows would prolong the kernel. A thread block takes
// at most 190 KB of shared memory, which every device with fused scoring has.
void launch_survivors(const Candidates& candidates, const DeviceRaggedSource& keys,
                      std::int64_t rows, int top_k, const TopK& out, bool empty,
                      const FallbackRows& fallback, void* stream) {
  const std::int64_t longest = std::min<std::int64_t>(keys.tokens, keys.max_keys);
  const bool scores = out.scores != nullptr;
  const auto launch = [&]<class Config>(Config) {
    const typename Config::Plan plan(top_k, longest, empty);
    launch_kernel("survivors",
                  scores ? survivors_kernel<Config, true> : survivors_kernel<Config, false>,
                  dim3(static_cast<unsigned>(rows)), Config::kThreads, plan.bytes(scores), stream,
                  candidates, keys, plan, out, fallback);
  };
  if (longest <= 1 << 16) {
    if (top_k <= 2048) {
      launch(SurvivorsConfig<256, 9, 4, 16, 4>{});
    } else if (top_k <= 4096) {
      launch(SurvivorsConfig<256, 16, 3, 16>{});
    } else {
      launch(SurvivorsConfig<512, 13, 2, 16>{});
    }
  } else if (longest <= 1 << 17) {
    if (top_k <= 2048) {
      launch(SurvivorsConfig<256, 9, 4, 17, 4>{});
    } else if (top_k <= 4096) {
      launch(SurvivorsConfig<512, 8, 2, 17, 2>{});
    } else {
      launch(SurvivorsConfig<512, 13, 2, 17>{});
    }
  } else if (longest > kMaxPositions) {
    launch(SurvivorsConfig<512, 12, 2, 32, 0, true>{});
  } else if (top_k <= 2048) {
    launch(SurvivorsConfig<512, 8, 2, 32>{});
  } else {
    launch(SurvivorsConfig<512, 12, 2, 32>{});
  }
}

}  // namespace misa::cuda::select
