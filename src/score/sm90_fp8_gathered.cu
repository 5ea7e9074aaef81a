// SPDX-License-Identifier: Apache-2.0
// Scores of gathered keys, one query per thread block; if there are few queries, several thread
// blocks divide a query's tiles of 128 keys among them.
//
//  1. Load the query's rows as the B operand: heads 16 c … 16 c + 15 in the columns that lane c of
//  a
//     quad accumulates, the residual row last.
//  2. While a tile is scored, each warp copies its 32 keys of the next tile, eight threads per key,
//     and each thread one scale. It also copies the list entries of the tile after that, and stores
//     them so that the positions of the eight keys that a thread helps to copy are contiguous.
//  3. Multiply in two products of 64 keys and 64 rows, which give a thread 16 dot products of each
//     of two keys. The second product runs while the first one's epilogue does step 4.
//  4. Each lane of a quad clips and adds up its 16 heads, a group (score/sm90_fp8_rows.cuh). Then
//     two of its lanes add up the four groups and the residual row, one key each.
#include <cuda_runtime.h>

#include <algorithm>
#include <cuda/ptx>

#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "score/sm90_fp8.hpp"
#include "score/sm90_fp8_config.cuh"
#include "score/sm90_fp8_gather.cuh"
#include "score/sm90_fp8_rows.cuh"

namespace misa::cuda::score {
namespace {

namespace ptx = ::cuda::ptx;

constexpr int kProducts = kGatheredProducts;
constexpr int kQuad = 4;
constexpr int kLaneRows = kMaxRows / kQuad;
static_assert(kLaneRows == kHeadGroup, "a lane has a group of heads");
static_assert(kWarpgroupThreads == 2 * kMaxRows, "two threads load a row");

// Step 1.
template <class Source>
__device__ void load_query(const GatheredArguments<Source>& arguments, std::int64_t t,
                           GatheredShared& shared) {
  const auto& [q, w, k] = arguments.problem;
  const ActiveRows& rows = arguments.rows;
  const int column = static_cast<int>(threadIdx.x) / 2;
  const int first_chunk = static_cast<int>(threadIdx.x) % 2 * (kChunks / 2);
  const int row = column % 8 / 2 * kLaneRows + column / 8 * 2 + column % 2;
  const std::uint8_t* source = nullptr;
  float weight = 0;
  if (row < rows.head_count) {
    const std::int32_t head = rows.heads == nullptr ? row : rows.heads[t * rows.head_count + row];
    if (is_head(q, head)) {
      source = static_cast<const std::uint8_t*>(q.data) + t * q.token_stride + head * q.head_stride;
      weight = w.data[t * w.token_stride + head];
    }
  } else if (rows.residual != nullptr && row == kMaxRows - 1) {
    source = rows.residual + t * kDim;
    weight = rows.residual_scale[t];
  }
#pragma unroll
  for (int i = 0; i < kChunks / 2; ++i) {
    const int chunk = first_chunk + i;
    const uint4 bytes = source == nullptr ? make_uint4(0, 0, 0, 0)
                                          : __ldg(reinterpret_cast<const uint4*>(source) + chunk);
    *reinterpret_cast<uint4*>(shared.rows + column * kDim + (chunk ^ column % 8) * 16) = bytes;
  }
  if (first_chunk == 0) {
    shared.weights[column] = weight;
  }
}

// Steps 2 to 4. With `nonnegative_scales` it assumes that no scale is negative, and returns whether
// some scale is, in which case the scores are wrong.
template <bool residual, bool blocks, bool nonnegative_scales, class Source>
__device__ bool score_query(const GatheredArguments<Source>& arguments, std::int64_t t,
                            GatheredShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto tile = static_cast<std::int32_t>(blockIdx.y);
  const auto step = static_cast<std::int32_t>(gridDim.y);
  Gather<Source, blocks> gather(arguments, t, tile, step);
  const Range range = visible(arguments.problem.k, t);
  const auto length =
      static_cast<std::int32_t>(min(std::int64_t{arguments.lengths[t]}, arguments.scores.columns));
  const std::int32_t tiles = (length + kTile - 1) / kTile;
  if (range.length <= arguments.unscored || tile >= tiles) {
    return false;
  }
  gather.set_range(arguments, range);
  gather.copy(shared.keys[0], shared.scales[0], shared.positions[1]);
  commit_copies();
  __syncthreads();  // the query's weights are in shared memory
  float weights[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    weights[i] = shared.weights[i / 2 * 8 + lane % kQuad * 2 + i % 2];
  }
  // The residual row, the last row of the quad's last lane, belongs to no group.
  const float linear_weight = residual ? shared.weights[kMaxRows - 1] : 0.0F;
  if (residual && lane % kQuad == kQuad - 1) {
    weights[kLaneRows - 1] = 0;
  }
  const std::uint64_t rows = swizzled_tile(shared.rows);
  const std::uint64_t first_keys = swizzled_tile(shared.keys[0]);
  float* const scores = arguments.scores.data + t * arguments.scores.columns;
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / kQuad;
  int signs = 0;

  for (int stage = 0; tile < tiles; tile += step, stage ^= 1) {
    wait_for_copies<0>();
    __syncwarp();
    gather.read(shared.positions[stage ^ 1]);
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();  // this tile is complete, and the stage of the one before it is free

    float sums[kProducts][kMaxRows / 2];  // step 3
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      const std::uint64_t keys = first_keys + static_cast<unsigned>((stage * kProducts + product) *
                                                                    kProductKeys * kDim / 16);
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<kMaxRows>(sums[product], keys + 2 * k, rows + 2 * k, k > 0);
      }
      wgmma_commit();
    }
    if (tile + step < tiles) {
      gather.copy(shared.keys[stage ^ 1], shared.scales[stage ^ 1], shared.positions[stage]);
    }
    commit_copies();

    // Step 4.
    const auto store_scores = [&](const float(&sums)[kMaxRows / 2], int key) {
      float scales[2] = {shared.scales[stage][key], shared.scales[stage][key + 8]};
      if constexpr (kPaged<Source>) {  // those of ragged keys are finite or NaN (launch_scales)
#pragma unroll
        for (float& scale : scales) {
          scale = isfinite(scale) ? scale : kNaN;
        }
      }
      signs |= __float_as_int(scales[0]) | __float_as_int(scales[1]);
      float groups[2] = {0, 0};
      float linear[2];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float x = sums[i / 2 * 4 + 2 * r + i % 2];
          if (!nonnegative_scales) {
            x = copysignf(1.0F, scales[r]) * x;
          }
          groups[r] = __fmaf_rn(weights[i], max_nan(x, 0), groups[r]);
          linear[r] = x;  // the lane's last row remains
        }
      }
      // Lane 0 of a quad adds up the groups of the first key and lane 1 those of the second.
      const bool odd = lane % 2 != 0;
      const float lane_sum = odd ? groups[1] : groups[0];  // for the lane's own key
      const float other_sum = odd ? groups[0] : groups[1];
      const float neighbour = __shfl_xor_sync(kFullMask, other_sum, 1);
      const float across = __shfl_xor_sync(kFullMask, lane_sum, 2);
      const float opposite = __shfl_xor_sync(kFullMask, other_sum, 3);
      float total = __fadd_rn(lane_sum, neighbour);
      total = __fadd_rn(__fadd_rn(total, odd ? opposite : across), odd ? across : opposite);
      if constexpr (residual) {
        const float first = __shfl_sync(kFullMask, linear[0], kQuad - 1, kQuad);
        const float second = __shfl_sync(kFullMask, linear[1], kQuad - 1, kQuad);
        total = __fmaf_rn(linear_weight, odd ? second : first, total);
      }
      const std::int32_t column = tile * kTile + key + (odd ? 8 : 0);
      if (lane % kQuad < 2 && column < length) {
        scores[column] = __fmul_rn(total, fabsf(odd ? scales[1] : scales[0]));
      }
    };
    wgmma_wait<1>();
    wgmma_pin(sums[0]);
    store_scores(sums[0], row);
    __syncwarp();  // keeps the compiler from moving the second wait up
    wgmma_wait<0>();
    wgmma_pin(sums[1]);
    store_scores(sums[1], kProductKeys + row);
  }
  wait_for_copies<0>();
  return __syncthreads_or(static_cast<int>(nonnegative_scales && signs < 0)) != 0;
}

template <class Source, bool residual, bool blocks>
__global__ void __launch_bounds__(kWarpgroupThreads, kGatheredBlocks)
    gathered_kernel(const __grid_constant__ GatheredArguments<Source> arguments) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  GatheredShared& shared = *reinterpret_cast<GatheredShared*>(memory);
  const std::int64_t t = blockIdx.x;
  load_query(arguments, t, shared);  // prefetch: the previous kernel does not write these inputs
  begin_kernel();
  if (score_query<residual, blocks, true>(arguments, t, shared)) {
    // Score again, moving the signs of scales to the products, which is exact.
    score_query<residual, blocks, false>(arguments, t, shared);
  }
}

}  // namespace

template <class Source>
void launch_gathered(const ProblemOf<Source>& problem, const ActiveRows& rows,
                     const Columns& columns, const std::int32_t* lengths, std::int32_t unscored,
                     const float* scales, const Scores& scores, int num_sms, void* stream) {
  const std::int64_t queries = problem.q.tokens;
  const std::int64_t tiles = (scores.columns + kTile - 1) / kTile;
  const std::int64_t blocks_per_query = std::clamp<std::int64_t>(
      std::int64_t{kGatheredBlocks} * num_sms / queries, 1, std::max<std::int64_t>(tiles, 1));
  const auto launch = [&]<bool residual, bool blocks>() {
    launch_kernel(
        "gathered scores", gathered_kernel<Source, residual, blocks>,
        dim3(static_cast<unsigned>(queries), static_cast<unsigned>(blocks_per_query)),
        kWarpgroupThreads, sizeof(GatheredShared), stream,
        GatheredArguments<Source>{problem, rows, columns, lengths, unscored, scales, scores});
  };
  if (rows.residual != nullptr) {
    columns.block > 1 ? launch.template operator()<true, true>()
                      : launch.template operator()<true, false>();
  } else {
    columns.block > 1 ? launch.template operator()<false, true>()
                      : launch.template operator()<false, false>();
  }
}

template void launch_gathered(const Problem&, const ActiveRows&, const Columns&,
                              const std::int32_t*, std::int32_t, const float*, const Scores&, int,
                              void*);
template void launch_gathered(const PagedProblem&, const ActiveRows&, const Columns&,
                              const std::int32_t*, std::int32_t, const float*, const Scores&, int,
                              void*);

}  // namespace misa::cuda::score
