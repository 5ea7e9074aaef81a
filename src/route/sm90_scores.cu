// Scores of block means on Hopper, for the block filter: e4m3 queries and keys, D = 128, at most 64
// heads. A warpgroup serves a query, a block of threads four.
//
//  1. The query's heads are operands in registers, in fp16.
//  2. Queries of one sequence share the means of whole blocks, which pass by in tiles: the next one
//     is copied while this one is multiplied. A row of the pool's table that holds another
//     sequence's block is computed here.
//  3. x = q . mean for all heads and a tile's blocks, the low parts of the means first.
//  4. A thread clips and weighs the two heads that it holds of every fourth pair of blocks, then
//     has a block of its own and adds up what the 32 threads found that hold its heads, in order.
//
// So the order of every sum follows from the query's own heads.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "device/mma.cuh"
#include "device/shared.cuh"
#include "route/heads.cuh"
#include "route/sm90_blocks.cuh"
#include "route/sm90_scores.hpp"

namespace misa::cuda::route {
namespace {

namespace ptx = ::cuda::ptx;

// Blocks of a tile: columns of a product, one a thread of a group.
constexpr int kBlocks = kGroupThreads;

// Threads that share a column, and floats from one's sums to the next's: in other banks.
constexpr int kShares = kMaxRows / 2;
constexpr int kSumPitch = kBlocks + 8;

struct Shared {
  BlockTiles<kBlocks> tiles;
  alignas(16) float sums[kGroups][kShares][kSumPitch];
};

static_assert(sizeof(Shared) + 1024 <= 227 * 1024);

struct Arguments {
  Problem problem;
  pool::Means means;
  float* scores;  // [T, stride]
  std::int64_t stride;
};

__global__ void __launch_bounds__(kGroupsThreads, 1)
    block_scores_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * kGroups;
  const int queries = static_cast<int>(min(std::int64_t{kGroups}, problem.q.tokens - t0));
  // The same for a whole warp, and the compiler is to know it.
  const int group = __shfl_sync(kWarp, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const std::int64_t t = t0 + group;

  Heads heads;  // step 1
  float weight[2] = {};
  bool exists[2] = {};
  std::int32_t own_whole = 0;
  if (group < queries) {
    heads.load(problem.q, t, warp * kTileHeads);
    own_whole = visible(problem.k, t).length / arguments.means.block;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = warp * kTileHeads + half * 8 + lane / 4;
      exists[half] = head < problem.q.heads;
      weight[half] = exists[half] ? problem.w.data[t * problem.w.token_stride + head] : 0;
    }
  }

  for (int first = 0, end = 0; first < queries; first = end) {
    const Sharers sharers(problem.k, arguments.means.block, t0, first, queries);
    const std::int32_t whole = sharers.whole;
    end = sharers.end;
    for (std::int32_t tile = -kBlocks; tile < whole; tile += kBlocks) {
      const std::int32_t next = tile + kBlocks;
      if (next < whole) {
        load_tile(shared.tiles, next / kBlocks % 2, problem.k, arguments.means, sharers.start, next,
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
      const int count = first <= group && group < end ? min(kBlocks, own_whole - tile) : 0;
      if (count > 0) {
        float x[kBlocks / 2];
        multiply(shared.tiles, buffer, heads, x);
        float* const sums = shared.sums[group][warp * 8 + lane / 4] + lane % 4 * 2;
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
      if (count > 0) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < kShares; ++i) {
          score += shared.sums[group][i][thread];
        }
        if (thread < count) {
          arguments.scores[t * arguments.stride + tile + thread] =
              score * shared.tiles.factors[buffer][thread];
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace

bool takes_sm90(const Problem& problem, const Device& device) {
  return device.hopper && problem.q.dtype == DType::e4m3 && problem.k.dtype == DType::e4m3 &&
         problem.q.dim == kDim && problem.q.heads <= kMaxRows;
}

void launch_block_scores_sm90(const Problem& problem, const pool::Means& means, float* scores,
                              std::int64_t stride, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((problem.q.tokens + kGroups - 1) / kGroups);
  launch_kernel("block scores", block_scores_kernel, dim3(blocks), kGroupsThreads, sizeof(Shared),
                stream, Arguments{problem, means, scores, stride});
}

}  // namespace misa::cuda::route
