// SPDX-License-Identifier: Apache-2.0
// The pooled router on Hopper: e4m3 queries and keys, D = 128, at most 64 heads. A thread block
// routes up to 16 consecutive queries in rounds: four queries per round, one per warpgroup, or
// eight if they have at most 32 heads.
//
//  1. Lane l of every warp gets the keys that query l sees. Warp i loads the weights of query i and
//     makes its partial block mean an operand.
//  2. Queries whose keys start at the same key share the means of whole blocks, in tiles. Up to two
//     tiles are loaded once per run of queries, and warpgroups then proceed independently; more
//     tiles are loaded anew in every round.
//  3. The query's heads are operands in registers, in fp16. Meanwhile those of the warp's next
//     query are loaded.
//  4. x = q . mean for all heads and the blocks of a tile. A lane sums max(0, x) over two of every
//     eight blocks, then the quad of a head adds up. The partial block is added last: a product of
//     mma.sync whose columns are the two parts of its mean.
//  5. After all rounds energies are multiplied by |w|, and warp i chooses the heads of query i.
//
// So the order of every sum depends only on the blocks that the query sees.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_mean.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "route/generic_config.cuh"
#include "route/sm90_fp8_pooled.hpp"

namespace misa::cuda::route {
namespace {

namespace ptx = ::cuda::ptx;

// Block means in a tile: columns of a product. With blocks of 1024 keys, a tile covers 64K keys.
constexpr int kTileMeans = 64;

static_assert(kThreadBlockQueries <= kSm90Warps);  // steps 1 and 5
static_assert(kFp16Parts == 2);                    // step 4: a lane has two columns

constexpr int kPartialPitch = operand_pitch(kDim);

struct PooledShared {
  MeanTiles<kTileMeans> tiles;
  // The two parts of every query's partial block mean. A product reads kMmaColumns rows from the
  // query's first row on; only its first two columns, the two parts, are used.
  alignas(16)
      std::uint16_t partial[(kThreadBlockQueries - 1) * kFp16Parts + kMmaColumns][kPartialPitch];
  float partial_factors[kThreadBlockQueries];  // 0: the query has no partial block
  float energies[kThreadBlockQueries][kMaxRows];
};

template <class Source>
struct Sm90PooledArguments {
  ProblemOf<Source> problem;
  BlockMeanTable means;
  int queries;          // per thread block
  std::int32_t count;   // heads to choose
  std::int32_t* heads;  // [T, count]
};

// Step 4's sums over the first `count` blocks of a tile.
__device__ void add_energies(const float (&x)[kTileMeans / 2], const float (&factors)[kTileMeans],
                             int count, float (&energy)[2]) {
  const int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < kTileMeans / 8; ++j) {
    const int block = 8 * j + 2 * c;
    const float2 factor = *reinterpret_cast<const float2*>(&factors[block]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (block + e < count) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          energy[half] = __fmaf_rn(max_nan(x[4 * j + 2 * half + e], 0),
                                   e == 0 ? factor.x : factor.y, energy[half]);
        }
      }
    }
  }
}

template <int query_warps, class Source>
__global__ void __launch_bounds__(kSm90Threads, 1)
    sm90_pooled_kernel(const __grid_constant__ Sm90PooledArguments<Source> arguments) {
  using Assignment = WarpAssignment<query_warps>;
  constexpr int kRoundQueries = Assignment::kRoundQueries;
  // Shuffles read lane round + slot, up to a round after the last query.
  static_assert(kThreadBlockQueries + kRoundQueries <= 32);
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<PooledShared*>(memory);
  const ProblemOf<Source>& problem = arguments.problem;
  const BlockMeanTable& means = arguments.means;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const Assignment assignment;
  const auto [warp, lane, slot, first_head] = assignment;

  Sm90HeadOperands::Raw next_heads = {};
  if (slot < queries) {
    Sm90HeadOperands::fetch(problem.q, t0 + slot, first_head, next_heads);
  }
  const Range range = range_of_lane(problem.k, t0, queries);  // step 1
  const std::int32_t blocks = range.length / means.block;
  const std::uint32_t partial_queries =
      __ballot_sync(kFullMask, range.length != blocks * means.block);
  float weights[2] = {};  // of heads `lane` and `lane` + 32
  if (warp < queries) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 32 * i + lane;
      weights[i] =
          head < problem.q.heads ? problem.w.data[(t0 + warp) * problem.w.token_stride + head] : 0;
    }
  }
  begin_kernel();  // nothing that the kernel of block means writes has been read yet
  const bool has_partial = (partial_queries >> warp & 1) != 0;
  const float4 partial = has_partial ? load_partial_mean<kDim>(means, t0 + warp) : float4{};

  for (int first = 0, end = 0; first < queries; first = end) {
    const QueryRun run(first, range, blocks);
    const std::int32_t max_blocks = run.max_blocks;
    end = run.end;
    const bool reload = max_blocks > 2 * kTileMeans;  // the tiles, in every round
    for (int round = first; round < end; round += kRoundQueries) {
      const bool loading = reload || round == first;
      const int query = round + slot;
      const std::int32_t length = __shfl_sync(kFullMask, range.length, query);
      const std::int32_t query_blocks = __shfl_sync(kFullMask, blocks, query);
      const bool working = query < end && length > 0;
      const std::int32_t product_blocks =  // of the longest query in the warp's product
          __reduce_max_sync(kFullMask,
                            lane < end && assignment.in_product(lane - round) ? blocks : 0);
      if (loading && max_blocks > 0) {  // step 2
        load_mean_tile(shared.tiles, 0, problem.k, means, run.sequence_start, 0,
                       min(kTileMeans, max_blocks));
      }
      commit_copies();
      Sm90HeadOperands heads;  // step 3
      heads.convert(next_heads);
      const int next_query = min(round + kRoundQueries, end) + slot;
      if (next_query < queries) {
        Sm90HeadOperands::fetch(problem.q, t0 + next_query, first_head, next_heads);
      }
      if (round == 0) {  // step 1
        const float factor = has_partial
                                 ? store_partial_mean<true, kDim>(
                                       partial, shared.partial[kFp16Parts * warp], kPartialPitch)
                                 : 0;
        if (lane == 0) {
          shared.partial_factors[warp] = factor;
        }
        __syncthreads();
      }

      float energy[2] = {};
      for (std::int32_t tile = 0; tile < max_blocks; tile += kTileMeans) {
        if (loading) {
          const std::int32_t next = tile + kTileMeans;
          if (next < max_blocks) {
            load_mean_tile(shared.tiles, next / kTileMeans % 2, problem.k, means,
                           run.sequence_start, next, min(kTileMeans, max_blocks - next));
          }
          commit_copies();
          wait_for_copies<1>();
          ptx::fence_proxy_async(ptx::space_shared);
          __syncthreads();
        }
        const int buffer = tile / kTileMeans % 2;
        if (product_blocks > tile) {
          float x[kTileMeans / 2];
          multiply_means(shared.tiles, buffer, heads, x);  // step 4
          add_energies(x, shared.tiles.factors[buffer], working ? query_blocks - tile : 0, energy);
        }
        if (reload) {
          __syncthreads();
        }
      }

      if (working) {
        const float factor = shared.partial_factors[query];
        float x[1][1][4] = {};
        if (factor != 0) {
          add_products<1>(heads, shared.partial[kFp16Parts * query], kPartialPitch, 0, x);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // In lane 0 of the quad the two columns are the parts of the mean.
          const float product = x[0][0][2 * half + 1] + x[0][0][2 * half];
          const float sum = __fmaf_rn(max_nan(product, 0), factor, quad_sum(energy[half]));
          if (lane % 4 == 0) {
            shared.energies[query][first_head + half * 8 + lane / 4] = sum;
          }
        }
      }
    }
    __syncthreads();
  }

  if (warp < queries) {  // step 5
    std::int32_t* out = arguments.heads + (t0 + warp) * arguments.count;
    if (__shfl_sync(kFullMask, range.length, warp) > 0) {
      choose_heads<kMaxRows>(
          static_cast<int>(problem.q.heads), arguments.count,
          [&](int j) { return fabsf(j < 32 ? weights[0] : weights[1]) * shared.energies[warp][j]; },
          out, nullptr);
    } else {
      for (int i = lane; i < arguments.count; i += 32) {
        out[i] = -1;
      }
    }
  }
}

}  // namespace

template <class Source>
void launch_pooled_sm90(const ProblemOf<Source>& problem, const BlockMeanTable& means,
                        std::int32_t count, std::int32_t* heads, int num_sms, cudaStream_t stream) {
  const int queries = thread_block_queries(problem.q.tokens, num_sms);
  const auto grid = static_cast<unsigned>((problem.q.tokens + queries - 1) / queries);
  launch_kernel("pooled routing",
                warps_of_query(problem.q.heads) == 2 ? sm90_pooled_kernel<2, Source>
                                                     : sm90_pooled_kernel<4, Source>,
                dim3(grid), kSm90Threads, sizeof(PooledShared), stream,
                Sm90PooledArguments<Source>{problem, means, queries, count, heads});
}

template void launch_pooled_sm90(const Problem&, const BlockMeanTable&, std::int32_t, std::int32_t*,
                                 int, cudaStream_t);
template void launch_pooled_sm90(const PagedProblem&, const BlockMeanTable&, std::int32_t,
                                 std::int32_t*, int, cudaStream_t);

}  // namespace misa::cuda::route
