// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper, for the block filter: e4m3 queries and keys, D = 128, at most 64
// heads. A block of threads serves four queries, a warpgroup each, or eight of up to 32 heads.
//
//  1. The query's heads are operands in registers, in fp16.
//  2. Queries of one sequence share the means of whole blocks, which pass by in tiles: the next one
//     is copied while this one is multiplied. A row of the pool's table that holds another
//     sequence's block is computed here.
//  3. x = q . mean for all heads and a tile's blocks, the low parts of the means first.
//  4. A thread clips and weighs the two heads that it holds of every fourth pair of blocks, then
//     has blocks of its own and adds up what the threads found that hold their heads, in order.
//
// So the order of every sum follows from the query's own heads.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/heads.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/range.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "filter/sm90_fp8_block_scores.hpp"

namespace misa::cuda::filter {
namespace {

namespace ptx = ::cuda::ptx;

// Blocks of a tile: columns of a product.
constexpr int kBlocks = 128;

// Threads of a warp that share a column, and floats from one's sums to the next's: in other banks.
constexpr int kShares = kTileHeads / 2;
constexpr int kSumPitch = kBlocks + 8;

struct Shared {
  BlockTiles<kBlocks> tiles;
  alignas(16) float sums[kGroupsWarps * kShares][kSumPitch];
};

static_assert(sizeof(Shared) + 1024 <= 227 * 1024);

struct Arguments {
  Problem problem;
  BlockMeans means;
  float* scores;  // [T, stride]
  std::int64_t stride;
};

template <int query_warps>
__global__ void __launch_bounds__(kGroupsThreads, 1)
    block_scores_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  using Own = Place<query_warps>;
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * Own::kAtOnce;
  const int queries = static_cast<int>(min(std::int64_t{Own::kAtOnce}, problem.q.tokens - t0));
  const Own place;
  const auto [warp, lane, query, first_head] = place;
  const std::int64_t t = t0 + query;

  Heads heads;  // step 1
  float weight[2] = {};
  bool exists[2] = {};
  if (query < queries) {
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
    const std::int32_t whole = run.whole;
    const std::int32_t own_whole = __shfl_sync(kFullMask, run.own, query);
    end = run.end;
    const std::int32_t product_whole =  // of the longest query in the warp's product
        __reduce_max_sync(kFullMask, place.shares(lane) ? run.own : 0);
    for (std::int32_t tile = -kBlocks; tile < whole; tile += kBlocks) {
      const std::int32_t next = tile + kBlocks;
      if (next < whole) {
        load_tile(shared.tiles, next / kBlocks % 2, problem.k, arguments.means, run.start, next,
                  min(kBlocks, whole - next));
      }
      commit_copies();
      if (tile < 0) {
        continue;
      }
      wait_for_copies<1>();
      ptx::fence_proxy_async(ptx::space_shared);
      __syncthreads();
      const int buffer = tile / kBlocks % 2;
      const int count = min(kBlocks, own_whole - tile);  // of the query's blocks in the tile
      float* const sums = shared.sums[warp * kShares + lane / 4] + lane % 4 * 2;
      if (product_whole > tile) {
        float x[kBlocks / 2];
        multiply(shared.tiles, buffer, heads, x);
#pragma unroll
        for (int j = 0; j < kBlocks / 8; ++j) {  // step 4
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
        for (int i = 0; i < query_warps * kShares; ++i) {
          score += shared.sums[query * query_warps * kShares + i][block];
        }
        arguments.scores[t * arguments.stride + tile + block] =
            score * shared.tiles.factors[buffer][block];
      }
      __syncthreads();
    }
  }
}

}  // namespace

void launch_block_scores_sm90(const Problem& problem, const BlockMeans& means, float* scores,
                              std::int64_t stride, cudaStream_t stream) {
  const auto launch = [&]<int query_warps>() {
    constexpr int kAtOnce = Place<query_warps>::kAtOnce;
    const auto blocks = static_cast<unsigned>((problem.q.tokens + kAtOnce - 1) / kAtOnce);
    launch_kernel("block scores", block_scores_kernel<query_warps>, dim3(blocks), kGroupsThreads,
                  sizeof(Shared), stream, Arguments{problem, means, scores, stride});
  };
  warps_of_query(problem.q.heads) == 2 ? launch.template operator()<2>()
                                       : launch.template operator()<4>();
}

}  // namespace misa::cuda::filter
