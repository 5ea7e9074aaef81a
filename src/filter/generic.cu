// SPDX-License-Identifier: Apache-2.0
// The block filter (HISA): which key blocks a query keeps. One warp per query or, if there are few
// queries, a thread block, whose warps have equal shares of consecutive blocks.
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

constexpr std::size_t kAlignment = 64;

// Warps of a thread block: of one query each, or all of one query.
constexpr int kWarps = 4;
constexpr int kWideWarps = 8;
constexpr int warps_of_block(int query_warps) { return query_warps > 1 ? query_warps : kWarps; }

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

// Whether block b competes: all do but the first and the last one.
__device__ bool competes(std::int32_t b, std::int32_t last) { return b > 0 && b < last; }

// The score of block b as ordered bits; 0, below every score that is counted, if b does not
// compete.
__device__ std::uint32_t score_bits(const float* scores, std::int32_t b, std::int32_t last) {
  return competes(b, last) ? ordered_bits(scores[b]) : 0;
}

// The blocks of a warp: `count` from `first` on.
struct WarpBlocks {
  std::int32_t first;
  std::int32_t count;
};

// Calls visit(b, score) for a lane's blocks of a warp's, in order; all lanes call it equally often.
template <class Visit>
__device__ void for_each_block(const std::uint32_t (&lane_scores)[kLaneScores], const float* scores,
                               const WarpBlocks& own, std::int32_t last, const Visit& visit) {
  const std::int32_t first = own.first + static_cast<std::int32_t>(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < kLaneScores; ++i) {
    if (i * 32 >= own.count) {
      break;
    }
    visit(first + i * 32, lane_scores[i]);
  }
  for (std::int32_t i = kLaneScores * 32; i < own.count; i += 32) {
    visit(first + i, score_bits(scores, first + i, last));
  }
}

// How many of a warp's blocks have a score of at least `least`, which is above 0.
__device__ std::int32_t count_at_least(const std::uint32_t (&lane_scores)[kLaneScores],
                                       const float* scores, const WarpBlocks& own,
                                       std::int32_t last, std::uint32_t least) {
  std::int32_t count = 0;
  for_each_block(lane_scores, scores, own, last,
                 [&](std::int32_t, std::uint32_t score) { count += score >= least ? 1 : 0; });
  return __reduce_add_sync(kFullMask, count);
}

// Sums over the warps of a query. Two sums in a row use different memory, so that one barrier a sum
// is enough.
template <int query_warps>
class WarpSums {
 public:
  struct Sum {
    std::int32_t all;
    std::int32_t before;  // of the warps before this one
  };

  // All threads of a thread block call if it has one query.
  __device__ Sum operator()(std::int32_t value) {
    if constexpr (query_warps == 1) {
      return {value, 0};
    } else {
      __shared__ std::int32_t values[2][query_warps];
      const int warp = static_cast<int>(threadIdx.x) / 32;
      const int lane = static_cast<int>(threadIdx.x) % 32;
      turn_ ^= 1;
      if (lane == 0) {
        values[turn_][warp] = value;
      }
      __syncthreads();
      const std::int32_t other = lane < query_warps ? values[turn_][lane] : 0;
      return {__reduce_add_sync(kFullMask, other),
              __reduce_add_sync(kFullMask, lane < warp ? other : 0)};
    }
  }

 private:
  int turn_ = 0;
};

template <int query_warps, class Source>
__global__ void __launch_bounds__(warps_of_block(query_warps) * 32)
    filter_kernel(const FilterArguments<Source> arguments) {
  begin_kernel();
  constexpr int kQueries = warps_of_block(query_warps) / query_warps;  // per thread block
  const auto warp = static_cast<std::int32_t>(threadIdx.x / 32);
  const std::int64_t t = std::int64_t{blockIdx.x} * kQueries + warp / query_warps;
  if (t >= arguments.tokens) {
    return;
  }
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  const std::int32_t n = visible(arguments.keys, t).length;
  const std::int32_t blocks = n / arguments.block + (n % arguments.block != 0 ? 1 : 0);
  const float* scores = arguments.scores + t * arguments.stride;
  std::int32_t* out = arguments.blocks + t * arguments.kept;
  if (blocks <= arguments.kept) {  // step 1
    for (std::int32_t i = warp % query_warps * 32 + lane; i < arguments.kept;
         i += query_warps * 32) {
      out[i] = i < blocks ? i : -1;
    }
    return;
  }

  const std::int32_t last = blocks - 1;
  const std::int32_t k = arguments.kept - 2;
  const std::int32_t share = (blocks + query_warps * 32 - 1) / (query_warps * 32) * 32;
  const std::int32_t first = min(warp % query_warps * share, blocks);
  const WarpBlocks own{first, min(share, blocks - first)};
  std::uint32_t lane_scores[kLaneScores];
#pragma unroll
  for (int i = 0; i < kLaneScores; ++i) {
    const std::int32_t b = i * 32 + lane;
    lane_scores[i] = b < own.count ? score_bits(scores, own.first + b, last) : 0;
  }
  WarpSums<query_warps> sum_over_warps;
  std::uint32_t kth = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {  // step 2
    const std::uint32_t candidate = kth | 1U << bit;
    const std::int32_t count =
        sum_over_warps(count_at_least(lane_scores, scores, own, last, candidate)).all;
    kth = count >= k ? candidate : kth;
    if (count == k) {
      break;
    }
  }

  const std::int32_t own_above = count_at_least(lane_scores, scores, own, last, kth + 1);
  const auto above = sum_over_warps(own_above);
  std::int32_t ties = k - above.all;  // tied ones to keep
  if constexpr (query_warps > 1) {
    std::int32_t own_tied = 0;
    for_each_block(lane_scores, scores, own, last, [&](std::int32_t b, std::uint32_t score) {
      own_tied += competes(b, last) && score == kth ? 1 : 0;
    });
    own_tied = __reduce_add_sync(kFullMask, own_tied);
    const std::int32_t tied_before = sum_over_warps(own_tied).before;
    out += above.before + min(tied_before, ties) + (own.first > 0 ? 1 : 0);
    ties = max(ties - tied_before, 0);
  }

  for_each_block(lane_scores, scores, own, last, [&](std::int32_t b, std::uint32_t score) {
    const std::uint32_t lower_lanes = (1U << lane) - 1;  // step 3
    const bool tie = competes(b, last) && score == kth;
    const std::uint32_t tied = __ballot_sync(kFullMask, tie);
    const bool kept = b == 0 || b == last || (competes(b, last) && score > kth) ||
                      (tie && __popc(tied & lower_lanes) < ties);
    const std::uint32_t kept_lanes = __ballot_sync(kFullMask, kept);
    if (kept) {
      out[__popc(kept_lanes & lower_lanes)] = b;
    }
    out += __popc(kept_lanes);
    ties -= min(ties, __popc(tied));
  });
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
  const auto select = [&]<int query_warps>() {
    constexpr int kBlockWarps = warps_of_block(query_warps);
    constexpr int kQueries = kBlockWarps / query_warps;
    const auto grid = static_cast<unsigned>((problem.q.tokens + kQueries - 1) / kQueries);
    launch_kernel("block filter", filter_kernel<query_warps, Source>, dim3(grid), kBlockWarps * 32,
                  0, stream,
                  FilterArguments<Source>{problem.k, problem.q.tokens, scores, stride,
                                          config.filter_block, config.filter_blocks, blocks});
  };
  problem.q.tokens <= 2 * std::int64_t{device.num_sms} ? select.template operator()<kWideWarps>()
                                                       : select.template operator()<1>();
}

template void launch(const Problem&, const IndexerConfig&, const DeviceTraits&,
                     const BlockMeanTable&, std::int32_t*, std::span<std::byte>, cudaStream_t);
template void launch(const PagedProblem&, const IndexerConfig&, const DeviceTraits&,
                     const BlockMeanTable&, std::int32_t*, std::span<std::byte>, cudaStream_t);

}  // namespace misa::cuda::filter
