// SPDX-License-Identifier: Apache-2.0
// The pooled router on Hopper: e4m3 queries and keys, D = 128, at most 64 heads. A block of threads
// serves up to 16 consecutive queries, four at a time, a warpgroup each, or eight of up to 32
// heads.
//
//  1. Lane l of every warp knows what query l sees. Warp i makes the mean of the block that query i
//     stands in an operand, and fetches that query's weights.
//  2. Queries whose keys start at the same one share the means of whole blocks, in tiles. Up to two
//     tiles are loaded once, and from then on warpgroups do not wait for each other; more of them
//     pass by for all queries at a time.
//  3. The query's heads are operands in registers, in fp16; those of the warp's next query are
//     fetched meanwhile.
//  4. x = q . mean for all heads and a tile's blocks. max(0, x) is summed over blocks, a lane two
//     columns in eight, then over the four lanes of a head. The query's own block comes last, as a
//     product of mma.sync that has the two parts of its mean as columns.
//  5. When all queries are done, |w| multiplies the energies and warp i chooses heads for query i.
//
// So the order of every sum follows from the query's own blocks.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/heads.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_mean.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/range.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "route/generic_config.cuh"
#include "route/sm90_fp8_pooled.hpp"

namespace misa::cuda::route {
namespace {

namespace ptx = ::cuda::ptx;

// Blocks of a tile: columns of a product. 64 of 1024 positions are 64K keys; two tiles 128K.
constexpr int kBlocks = 64;

static_assert(kQueries <= kGroupsWarps);  // steps 1 and 5
static_assert(kFp16Parts == 2);           // step 4: a lane has two columns

constexpr int kOwnPitch = operand_pitch(kDim);

struct Shared {
  BlockTiles<kBlocks> tiles;
  // Parts of own means. Those of a query are columns of one product, whose other columns, what
  // stands behind, nobody reads.
  alignas(16) std::uint16_t own[(kQueries - 1) * kFp16Parts + kTileKeys][kOwnPitch];
  float own_factors[kQueries];  // 0: the query stands in no block
  float energies[kQueries][kMaxRows];
};

struct Arguments {
  Problem problem;
  BlockMeans means;
  int queries;          // of a block of threads
  std::int32_t count;   // heads wanted
  std::int32_t* heads;  // [T, count]
};

// Step 4's sums over the first `count` blocks of a tile.
__device__ void add_energies(const float (&x)[kBlocks / 2], const float (&factors)[kBlocks],
                             int count, float (&energy)[2]) {
  const int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < kBlocks / 8; ++j) {
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

template <int query_warps>
__global__ void __launch_bounds__(kGroupsThreads, 1)
    pooled_kernel(const __grid_constant__ Arguments arguments) {
  using Own = Place<query_warps>;
  static_assert(kQueries + Own::kAtOnce <= 32);  // there is a lane for every query, and one without
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Problem& problem = arguments.problem;
  const BlockMeans& means = arguments.means;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const Own place;
  const auto [warp, lane, query, first_head] = place;

  Heads::Raw next = {};
  if (query < queries) {
    Heads::fetch(problem.q, t0 + query, first_head, next);
  }
  const Range range = range_of_lane(problem.k, t0, queries);  // step 1
  const std::int32_t blocks = range.length / means.block;
  const std::uint32_t standing = __ballot_sync(kFullMask, range.length != blocks * means.block);
  float weights[2] = {};  // of heads `lane` and `lane` + 32
  if (warp < queries) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 32 * i + lane;
      weights[i] =
          head < problem.q.heads ? problem.w.data[(t0 + warp) * problem.w.token_stride + head] : 0;
    }
  }
  begin_kernel();  // so far nothing was read that the pool writes
  const bool stands = (standing >> warp & 1) != 0;
  const float4 own = stands ? load_partial_mean<kDim>(means, t0 + warp) : float4{};

  for (int first = 0, end = 0; first < queries; first = end) {
    const QueryRun run(first, range, blocks);
    const std::int32_t whole = run.whole;
    end = run.end;
    const bool passing = whole > 2 * kBlocks;
    for (int round = first; round < end; round += Own::kAtOnce) {
      const bool loading = passing || round == first;
      const int slot = round + query;
      const std::int32_t length = __shfl_sync(kFullMask, range.length, slot);
      const std::int32_t own_whole = __shfl_sync(kFullMask, blocks, slot);
      const bool working = slot < end && length > 0;
      const std::int32_t product_whole =  // of the longest query in the warp's product
          __reduce_max_sync(kFullMask, lane < end && place.shares(lane - round) ? blocks : 0);
      if (loading && whole > 0) {
        load_tile(shared.tiles, 0, problem.k, means, run.start, 0, min(kBlocks, whole));
      }
      commit_copies();
      Heads heads;  // step 3
      heads.take(next);
      const int next_slot = min(round + Own::kAtOnce, end) + query;
      if (next_slot < queries) {
        Heads::fetch(problem.q, t0 + next_slot, first_head, next);
      }
      if (round == 0) {  // step 1
        const float factor =
            stands ? store_partial_mean<true, kDim>(own, shared.own[kFp16Parts * warp], kOwnPitch)
                   : 0;
        if (lane == 0) {
          shared.own_factors[warp] = factor;
        }
        __syncthreads();
      }

      float energy[2] = {};
      for (std::int32_t tile = 0; tile < whole; tile += kBlocks) {
        if (loading) {
          const std::int32_t behind = tile + kBlocks;
          if (behind < whole) {
            load_tile(shared.tiles, behind / kBlocks % 2, problem.k, means, run.start, behind,
                      min(kBlocks, whole - behind));
          }
          commit_copies();
          wait_for_copies<1>();
          ptx::fence_proxy_async(ptx::space_shared);
          __syncthreads();
        }
        const int buffer = tile / kBlocks % 2;
        if (product_whole > tile) {
          float x[kBlocks / 2];
          multiply(shared.tiles, buffer, heads, x);
          add_energies(x, shared.tiles.factors[buffer], working ? own_whole - tile : 0, energy);
        }
        if (passing) {
          __syncthreads();
        }
      }

      if (working) {
        const float factor = shared.own_factors[slot];
        float x[1][1][4] = {};
        if (factor != 0) {
          add_products<1>(heads, shared.own[kFp16Parts * slot], kOwnPitch, 0, x);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float product = x[0][0][2 * half + 1] + x[0][0][2 * half];  // of lane 0 of four
          const float sum = __fmaf_rn(max_nan(product, 0), factor, sum_of_four(energy[half]));
          if (lane % 4 == 0) {
            shared.energies[slot][first_head + half * 8 + lane / 4] = sum;
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

void launch_pooled_sm90(const Problem& problem, const BlockMeans& means, std::int32_t count,
                        std::int32_t* heads, int num_sms, cudaStream_t stream) {
  const int queries = queries_of_block(problem.q.tokens, num_sms);
  const auto blocks = static_cast<unsigned>((problem.q.tokens + queries - 1) / queries);
  launch_kernel("pooled routing",
                warps_of_query(problem.q.heads) == 2 ? pooled_kernel<2> : pooled_kernel<4>,
                dim3(blocks), kGroupsThreads, sizeof(Shared), stream,
                Arguments{problem, means, queries, count, heads});
}

}  // namespace misa::cuda::route
