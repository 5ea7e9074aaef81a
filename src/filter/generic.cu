// SPDX-License-Identifier: Apache-2.0
// The block filter (HISA): which key blocks a query keeps. One warp per query.
//
//  1. A query of at most `filter_blocks` blocks keeps them all.
//  2. Other queries keep the first and the last block, and the rest compete for the remaining k =
//     filter_blocks - 2 places. The k-th largest score is found as ordered bits, bit by bit: it is
//     the largest number that at least k scores reach. The search ends early at a number that
//     exactly k scores reach.
//  3. Blocks above the k-th score are kept, and of tied blocks the lowest, in ascending order.
#include <cuda_runtime.h>

#include "core/entry.hpp"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"
#include "filter/block_scores.hpp"
#include "filter/generic.hpp"

namespace misa::cuda::filter {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr std::size_t kAlignment = 64;

// Scores that a lane keeps in registers: those of 1024 blocks per warp. Scores of further blocks
// are read every time.
constexpr int kLaneScores = 32;

template <class Source>
struct FilterArguments {
  Source keys;
  std::int64_t tokens;
  const float* scores;  // [T, stride]
  std::int64_t stride;
  std::int32_t block;
  std::int32_t kept;     // blocks to keep
  std::int32_t* blocks;  // [T, kept]
};

// The score of block b as ordered bits; 0, below every score that is counted, if b does not
// compete.
__device__ std::uint32_t score_bits(const float* scores, std::int32_t b, std::int32_t last) {
  return b > 0 && b < last ? ordered_bits(scores[b]) : 0;
}

// How many of blocks 1 … last - 1 have a score of at least `least`, which is above 0.
__device__ std::int32_t count_at_least(const std::uint32_t (&lane_scores)[kLaneScores],
                                       const float* scores, std::int32_t last,
                                       std::uint32_t least) {
  std::int32_t count = 0;
#pragma unroll
  for (int i = 0; i < kLaneScores; ++i) {
    if (i * 32 >= last) {
      break;
    }
    count += lane_scores[i] >= least ? 1 : 0;
  }
  for (std::int32_t b = kLaneScores * 32 + static_cast<std::int32_t>(threadIdx.x % 32); b < last;
       b += 32) {
    count += score_bits(scores, b, last) >= least ? 1 : 0;
  }
  return __reduce_add_sync(kFullMask, count);
}

template <class Source>
__global__ void __launch_bounds__(kThreads) filter_kernel(const FilterArguments<Source> arguments) {
  begin_kernel();
  const std::int64_t t = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (t >= arguments.tokens) {
    return;
  }
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  const std::int32_t n = visible(arguments.keys, t).length;
  const std::int32_t blocks = n / arguments.block + (n % arguments.block != 0 ? 1 : 0);
  const float* scores = arguments.scores + t * arguments.stride;
  std::int32_t* out = arguments.blocks + t * arguments.kept;
  if (blocks <= arguments.kept) {  // step 1
    for (std::int32_t i = lane; i < arguments.kept; i += 32) {
      out[i] = i < blocks ? i : -1;
    }
    return;
  }

  const std::int32_t last = blocks - 1;
  const std::int32_t k = arguments.kept - 2;
  std::uint32_t lane_scores[kLaneScores];
#pragma unroll
  for (int i = 0; i < kLaneScores; ++i) {
    lane_scores[i] = score_bits(scores, i * 32 + lane, last);
  }
  std::uint32_t kth = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {  // step 2
    const std::uint32_t candidate = kth | 1U << bit;
    const std::int32_t count = count_at_least(lane_scores, scores, last, candidate);
    kth = count >= k ? candidate : kth;
    if (count == k) {
      break;
    }
  }
  std::int32_t ties = k - count_at_least(lane_scores, scores, last, kth + 1);  // tied ones to keep

  const auto write_kept = [&](std::int32_t b, std::uint32_t score) {  // step 3
    const bool competes = b > 0 && b < last;
    const std::uint32_t lower_lanes = (1U << lane) - 1;
    const std::uint32_t tied = __ballot_sync(kFullMask, competes && score == kth);
    const bool kept = b == 0 || b == last || (competes && score > kth) ||
                      (competes && score == kth && __popc(tied & lower_lanes) < ties);
    const std::uint32_t kept_lanes = __ballot_sync(kFullMask, kept);
    if (kept) {
      out[__popc(kept_lanes & lower_lanes)] = b;
    }
    out += __popc(kept_lanes);
    ties -= min(ties, __popc(tied));
  };
#pragma unroll
  for (int i = 0; i < kLaneScores; ++i) {
    if (i * 32 >= blocks) {
      break;
    }
    write_kept(i * 32 + lane, lane_scores[i]);
  }
  for (std::int32_t first = kLaneScores * 32; first < blocks; first += 32) {
    write_kept(first + lane, score_bits(scores, first + lane, last));
  }
}

// The most blocks that a query can see.
std::int64_t score_stride(std::int64_t max_keys, std::int32_t block) {
  return (max_keys + block - 1) / block;
}

std::size_t score_bytes(std::int64_t tokens, std::int64_t stride) {
  const std::size_t bytes =
      static_cast<std::size_t>(tokens) * static_cast<std::size_t>(stride) * sizeof(float);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

std::size_t workspace_bytes(const IndexerConfig& config, const Shape& shape) {
  return score_bytes(shape.tokens, score_stride(shape.max_keys, config.filter_block));
}

template <class Source>
bool reads_means(const ProblemOf<Source>& problem, const DeviceTraits& device) {
  return !scores_from_sums(problem, device);
}

template bool reads_means(const Problem&, const DeviceTraits&);
template bool reads_means(const PagedProblem&, const DeviceTraits&);

template <class Source>
void launch(const ProblemOf<Source>& problem, const IndexerConfig& config,
            const DeviceTraits& device, const BlockMeanTable& means, std::int32_t* blocks,
            std::span<std::byte> workspace, cudaStream_t stream) {
  if (problem.q.tokens == 0) {
    return;
  }
  const std::int64_t stride = score_stride(problem.k.max_keys, config.filter_block);
  auto* scores = reinterpret_cast<float*>(workspace.data());
  launch_block_scores(problem, device, means, scores, stride, stream);
  const auto grid = static_cast<unsigned>((problem.q.tokens + kWarps - 1) / kWarps);
  launch_kernel("block filter", filter_kernel<Source>, dim3(grid), kThreads, 0, stream,
                FilterArguments<Source>{problem.k, problem.q.tokens, scores, stride,
                                        config.filter_block, config.filter_blocks, blocks});
}

template void launch(const Problem&, const IndexerConfig&, const DeviceTraits&,
                     const BlockMeanTable&, std::int32_t*, std::span<std::byte>, cudaStream_t);
template void launch(const PagedProblem&, const IndexerConfig&, const DeviceTraits&,
                     const BlockMeanTable&, std::int32_t*, std::span<std::byte>, cudaStream_t);

}  // namespace misa::cuda::filter
