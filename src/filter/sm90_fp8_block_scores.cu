// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper, for the block filter: e4m3 queries and keys, D = 128, at most 64
// heads. A thread block scores four queries, one per warpgroup, or eight of at most 32 heads.
//
//  1. The query's heads are operands in registers, in fp16.
//  2. Queries whose keys start at the same key share the means of whole blocks, tile by tile: while
//     one tile is multiplied the next is copied. Where a table row holds the block of another
//     sequence, the mean is computed here.
//  3. x = q . mean for all heads and the blocks of a tile, the low parts of the means first.
//  4. Sums over the heads (filter/sm90_fp8_head_sums.cuh).
//
// If there are few queries, several thread blocks divide their tiles among them.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "filter/sm90_fp8_block_scores.hpp"
#include "filter/sm90_fp8_head_sums.cuh"

namespace misa::cuda::filter {
namespace {

namespace ptx = ::cuda::ptx;

// Block means in a tile: columns of a product.
constexpr int kTileMeans = 128;

struct BlockScoresShared {
  MeanTiles<kTileMeans> tiles;
  HeadSums<kSm90Warps, kTileMeans> sums;
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
  LaneHeads lane_heads;
  if (slot < queries) {
    heads.load(problem.q, t, first_head);
    lane_heads.load(problem, t, first_head);
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
    const TileShare share(max_blocks, kTileMeans);
    for (std::int32_t tile = share.first - kTileMeans; tile < share.end; tile += kTileMeans) {
      const std::int32_t next = tile + kTileMeans;
      if (next < share.end) {  // step 2
        load_mean_tile(shared.tiles, next / kTileMeans % 2, problem.k, arguments.means,
                       run.sequence_start, next, min(kTileMeans, max_blocks - next));
      }
      commit_copies();
      if (tile < share.first) {
        continue;
      }
      wait_for_copies<1>();
      ptx::fence_proxy_async(ptx::space_shared);
      __syncthreads();
      const int buffer = tile / kTileMeans % 2;
      const int count = min(kTileMeans, query_blocks - tile);  // of the query's blocks in the tile
      if (product_blocks > tile) {
        float x[kTileMeans / 2];
        multiply_means(shared.tiles, buffer, heads, x);  // step 3
        shared.sums.store(warp, lane_heads, x);          // step 4
      }
      __syncthreads();
      for (int block = warp % query_warps * 32 + lane; block < count; block += query_warps * 32) {
        arguments.scores[t * arguments.stride + tile + block] =
            shared.sums.template score<query_warps>(slot, block) *
            shared.tiles.factors[buffer][block];
      }
      __syncthreads();
    }
  }
}

}  // namespace

template <class Source>
void launch_block_scores_sm90(const ProblemOf<Source>& problem, const BlockMeanTable& means,
                              float* scores, std::int64_t stride, int num_sms,
                              cudaStream_t stream) {
  const auto launch = [&]<int query_warps>() {
    constexpr int kRoundQueries = WarpAssignment<query_warps>::kRoundQueries;
    const dim3 grid = shared_tiles_grid((problem.q.tokens + kRoundQueries - 1) / kRoundQueries,
                                        stride, kTileMeans, num_sms);
    launch_kernel("block scores", sm90_block_scores_kernel<query_warps, Source>, grid, kSm90Threads,
                  sizeof(BlockScoresShared), stream,
                  Sm90BlockScoresArguments<Source>{problem, means, scores, stride});
  };
  warps_of_query(problem.q.heads) == 2 ? launch.template operator()<2>()
                                       : launch.template operator()<4>();
}

template void launch_block_scores_sm90(const Problem&, const BlockMeanTable&, float*, std::int64_t,
                                       int, cudaStream_t);
template void launch_block_scores_sm90(const PagedProblem&, const BlockMeanTable&, float*,
                                       std::int64_t, int, cudaStream_t);

}  // namespace misa::cuda::filter
