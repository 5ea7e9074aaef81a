// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper, for the block filter: e4m3 queries and keys, D = 128, at most 64
// heads. A thread block scores four queries, one per warpgroup, or eight of at most 32 heads.
//
//  1. The query's heads are operands in registers, in fp16.
//  2. Queries whose keys start at the same key share the means of whole blocks, tile by tile: while
//     one tile is multiplied the next is copied. Where a table row holds the block of another
//     sequence, the mean is computed here.
//  3. x = q . mean for all heads and the blocks of a tile, the low parts of the means first.
//  4. A thread holds two heads of two of every eight blocks. It stores the sum of w max(0, x) over
//     these heads. After a barrier the query's threads divide its blocks among them and add up the
//     sums that were stored for each block, in order.
//
// So the order of every sum depends only on the query's number of heads.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "filter/sm90_fp8_block_scores.hpp"

namespace misa::cuda::filter {
namespace {

namespace ptx = ::cuda::ptx;

// Block means in a tile: columns of a product.
constexpr int kTileMeans = 128;

// Partial sums of a block that one warp stores: one for every two of its 16 heads. The pitch
// between rows of sums puts them in different banks.
constexpr int kWarpSums = kMmaHeads / 2;
constexpr int kSumPitch = kTileMeans + 8;

struct BlockScoresShared {
  MeanTiles<kTileMeans> tiles;
  alignas(16) float sums[kSm90Warps * kWarpSums][kSumPitch];
};

static_assert(sizeof(BlockScoresShared) + 1024 <= 227 * 1024);

template <class Source>
struct Sm90BlockScoresArguments {
  ProblemOf<Source> problem;
  BlockMeanTable means;
  float* scores;  // [T, stride]
  std::int64_t stride;
};

template <int query_warps, class Source>
__global__ void __launch_bounds__(kSm90Threads, 1)
    sm90_block_scores_kernel(const __grid_constant__ Sm90BlockScoresArguments<Source> arguments) {
  begin_kernel();
  using Assignment = WarpAssignment<query_warps>;
  constexpr int kRoundQueries = Assignment::kRoundQueries;
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<BlockScoresShared*>(memory);
  const ProblemOf<Source>& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * kRoundQueries;
  const int queries = static_cast<int>(min(std::int64_t{kRoundQueries}, problem.q.tokens - t0));
  const Assignment assignment;
  const auto [warp, lane, slot, first_head] = assignment;
  const std::int64_t t = t0 + slot;

  Sm90HeadOperands heads;  // step 1
  float weight[2] = {};
  bool exists[2] = {};
  if (slot < queries) {
    heads.load(problem.q, t, first_head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first_head + half * 8 + lane / 4;
      exists[half] = head < problem.q.heads;
      weight[half] = exists[half] ? problem.w.data[t * problem.w.token_stride + head] : 0;
    }
  }
  const Range range = range_of_lane(problem.k, t0, queries);
  const std::int32_t blocks = range.length / arguments.means.block;

  for (int first = 0, end = 0; first < queries; first = end) {
    const QueryRun run(first, range, blocks);
    const std::int32_t max_blocks = run.max_blocks;
    const std::int32_t query_blocks = __shfl_sync(kFullMask, run.lane_blocks, slot);
    end = run.end;
    const std::int32_t product_blocks =  // of the longest query in the warp's product
        __reduce_max_sync(kFullMask, assignment.in_product(lane) ? run.lane_blocks : 0);
    for (std::int32_t tile = -kTileMeans; tile < max_blocks; tile += kTileMeans) {
      const std::int32_t next = tile + kTileMeans;
      if (next < max_blocks) {  // step 2
        load_mean_tile(shared.tiles, next / kTileMeans % 2, problem.k, arguments.means,
                       run.sequence_start, next, min(kTileMeans, max_blocks - next));
      }
      commit_copies();
      if (tile < 0) {
        continue;
      }
      wait_for_copies<1>();
      ptx::fence_proxy_async(ptx::space_shared);
      __syncthreads();
      const int buffer = tile / kTileMeans % 2;
      const int count = min(kTileMeans, query_blocks - tile);  // of the query's blocks in the tile
      float* const sums = shared.sums[warp * kWarpSums + lane / 4] + lane % 4 * 2;
      if (product_blocks > tile) {
        float x[kTileMeans / 2];
        multiply_means(shared.tiles, buffer, heads, x);  // step 3
#pragma unroll
        for (int j = 0; j < kTileMeans / 8; ++j) {  // step 4
          float sum[2] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float clipped = max_nan(x[4 * j + 2 * half + e], 0);
              sum[e] = exists[half] ? __fmaf_rn(weight[half], clipped, sum[e]) : sum[e];
            }
          }
          *reinterpret_cast<float2*>(sums + 8 * j) = make_float2(sum[0], sum[1]);
        }
      }
      __syncthreads();
      for (int block = warp % query_warps * 32 + lane; block < count; block += query_warps * 32) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < query_warps * kWarpSums; ++i) {
          score += shared.sums[slot * query_warps * kWarpSums + i][block];
        }
        arguments.scores[t * arguments.stride + tile + block] =
            score * shared.tiles.factors[buffer][block];
      }
      __syncthreads();
    }
  }
}

}  // namespace

template <class Source>
void launch_block_scores_sm90(const ProblemOf<Source>& problem, const BlockMeanTable& means,
                              float* scores, std::int64_t stride, cudaStream_t stream) {
  const auto launch = [&]<int query_warps>() {
    constexpr int kRoundQueries = WarpAssignment<query_warps>::kRoundQueries;
    const auto grid = static_cast<unsigned>((problem.q.tokens + kRoundQueries - 1) / kRoundQueries);
    launch_kernel("block scores", sm90_block_scores_kernel<query_warps, Source>, dim3(grid),
                  kSm90Threads, sizeof(BlockScoresShared), stream,
                  Sm90BlockScoresArguments<Source>{problem, means, scores, stride});
  };
  warps_of_query(problem.q.heads) == 2 ? launch.template operator()<2>()
                                       : launch.template operator()<4>();
}

template void launch_block_scores_sm90(const Problem&, const BlockMeanTable&, float*, std::int64_t,
                                       cudaStream_t);
template void launch_block_scores_sm90(const PagedProblem&, const BlockMeanTable&, float*,
                                       std::int64_t, cudaStream_t);

}  // namespace misa::cuda::filter
