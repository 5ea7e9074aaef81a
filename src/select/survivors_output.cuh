// SPDX-License-Identifier: Apache-2.0
// Steps 4 and 5 of survivors.cu: marks the selected candidates in a bitmap of positions, ranks them
// by a scan over its words, and stages the output in shared memory. `Config` is that of
// survivors.cu.
#pragma once

#include <cstdint>

#include "core/entry.hpp"
#include "select/survivors_kth.cuh"

namespace misa::cuda::select {

// Where the output is made, in shared memory.
struct OutputStage {
  std::uint32_t positions;    // that the bitmap covers: a window of the row
  std::uint32_t* bitmap;      // [positions / 32]
  std::uint16_t* ranks;       // [positions / 32] of the first position of each word of the bitmap
  std::uint32_t* indices;     // [top_k]
  std::uint32_t* score_keys;  // [top_k], if scores are requested
};

template <int threads>
__device__ void clear_bitmap(const OutputStage& stage) {
  for (std::uint32_t i = threadIdx.x; i < stage.positions / 128; i += threads) {
    reinterpret_cast<uint4*>(stage.bitmap)[i] = uint4{0, 0, 0, 0};
  }
}

// Ranks the first position of each word of the bitmap; ranks begin with `staged`. Returns how many
// positions are marked.
template <class Config>
__device__ std::uint32_t rank_words(typename Config::Shared& shared, const OutputStage& stage,
                                    std::uint32_t staged) {
  // Each thread has adjacent words.
  const std::uint32_t words = stage.positions / 32 / Config::kThreads;
  const std::uint32_t begin = threadIdx.x * words;
  std::uint32_t sum = 0;
  for (std::uint32_t i = 0; i < words; i += 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(stage.bitmap + begin + i);
    sum += __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
  }
  std::uint32_t rank = 0;
  std::uint32_t total = 0;
  typename Config::Radix::Scan(shared.radix.scan).ExclusiveSum(sum, rank, total);
  rank += staged;
  for (std::uint32_t i = 0; i < words; i += 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(stage.bitmap + begin + i);
    const std::uint32_t second = rank + __popc(bits.x);
    const std::uint32_t third = second + __popc(bits.y);
    const std::uint32_t fourth = third + __popc(bits.z);
    *reinterpret_cast<uint2*>(stage.ranks + begin + i) = {rank | second << 16,
                                                          third | fourth << 16};
    rank = fourth + __popc(bits.w);
  }
  return total;
}

// Stages the marked positions of the window that begins with `first`.
template <class Config>
__device__ void stage_indices(const OutputStage& stage, std::uint32_t first) {
  // Adjacent words go to different threads, so that many share the work where selected positions
  // are dense.
  for (std::uint32_t i = threadIdx.x; i < stage.positions / 32; i += 4 * Config::kThreads) {
    std::uint32_t bits[4];
    std::uint32_t ranks[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bits[j] = stage.bitmap[i + j * Config::kThreads];
      ranks[j] = stage.ranks[i + j * Config::kThreads];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::uint32_t base = first + (i + j * Config::kThreads) * 32;
      for (; bits[j] != 0; bits[j] &= bits[j] - 1) {
        stage.indices[ranks[j]++] = base + __ffs(static_cast<int>(bits[j])) - 1;
      }
    }
  }
}

// Stages the selected candidates and returns their number. `reread()` gives the candidates with
// their original keys.
template <class Config, bool scores, class Source, class Reread>
__device__ std::uint32_t stage_output(typename Config::Shared& shared, const OutputStage& stage,
                                      const Source& candidates, const KthRange& kth,
                                      std::uint32_t length, const Reread& reread) {
  std::uint64_t entry = 0;  // the entry (entry.hpp) that the thread ranked, if selected; else 0
  std::uint32_t staged = 0;
  for (std::uint32_t first = 0; first < length; first += stage.positions) {
    const auto in_window = [&](std::uint32_t position) {
      return !Config::kWindows || position - first < stage.positions;
    };
    const auto mark = [&](std::uint32_t position) {
      const std::uint32_t offset = position - first;
      atomicOr(&stage.bitmap[offset / 32], 1U << offset % 32);
    };
    candidates.visit([&](std::uint32_t key, std::uint32_t position) {  // step 4
      if (key > kth.high && in_window(position)) {
        mark(position);
      }
    });
    if (first == 0 && kth.quota != 0) {  // rank the candidates in the range directly
      candidates.visit([&](std::uint32_t key, std::uint32_t position) {
        if (key >= kth.low && key <= kth.high) {
          const std::uint32_t slot = atomicAdd(&shared.ranked_count, 1U);
          if (slot < Config::kThreads) {
            shared.ranked[slot] = std::uint64_t{key} << 32 | ~position;
          }
        }
      });
      __syncthreads();
      const std::uint32_t ranked = min(shared.ranked_count, std::uint32_t{Config::kThreads});
      if (threadIdx.x < ranked) {
        entry = shared.ranked[threadIdx.x];
        std::uint32_t larger = 0;
        for (std::uint32_t i = 0; i < ranked; ++i) {
          larger += shared.ranked[i] > entry ? 1 : 0;
        }
        entry = larger < kth.quota ? entry : 0;
      }
    }
    if (entry != 0 && in_window(entry_position(entry))) {
      mark(entry_position(entry));
    }
    __syncthreads();

    const std::uint32_t marked = rank_words<Config>(shared, stage, staged);  // step 5
    __syncthreads();
    stage_indices<Config>(stage, first);
    if constexpr (scores) {
      const auto stage_score = [&](std::uint32_t key, std::uint32_t position) {
        if (key == 0 || !in_window(position)) {
          return;
        }
        const std::uint32_t offset = position - first;
        const std::uint32_t bits = stage.bitmap[offset / 32];
        const std::uint32_t bit = 1U << offset % 32;
        if ((bits & bit) != 0) {
          stage.score_keys[stage.ranks[offset / 32] + __popc(bits & (bit - 1))] = key;
        }
      };
      if (kth.by_position) {
        reread().visit(stage_score);
      } else {
        candidates.visit(stage_score);
      }
    }
    staged += marked;
    __syncthreads();
    if (!Config::kWindows || length - first <= stage.positions) {
      break;
    }
    clear_bitmap<Config::kThreads>(stage);
    __syncthreads();
  }
  return staged;
}

}  // namespace misa::cuda::select
