// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper without a block-mean table, for sequences of few queries whose
// cache keeps sums: e4m3 queries, D = 128, at most 64 heads. The sums are read once and no mean is
// written, so that the kernel takes as long as that read. A thread block is a warpgroup, and an SM
// has several: while one waits for sums, others multiply.
//
//  1. A warp makes operands of the means of 16 consecutive blocks, from the sums of their groups.
//  2. x = q . mean for all heads of one query, or of two of at most 32 heads, and the blocks of a
//     tile, the low parts of the means first.
//  3. Sums over the heads (filter/sm90_fp8_head_sums.cuh).
//
// Steps 2 and 3 are repeated for the other queries of the sequence. A score has the bits that
// sm90_fp8_block_scores.cu gives it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cuda/ptx>

#include "cuda/block_means.cuh"
#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "filter/sm90_fp8_head_sums.cuh"
#include "filter/sm90_fp8_scores_from_sums.hpp"

namespace misa::cuda::filter {
namespace {

namespace ptx = ::cuda::ptx;

// Block means in a tile: columns of a product.
constexpr int kTileMeans = 64;
constexpr int kWarps = kWarpgroupWarps;
constexpr int kWarpMeans = kTileMeans / kWarps;
constexpr int kThreads = kWarps * 32;

// Thread blocks per SM, for which registers and shared memory are enough. Together they have 64 KB
// of sums in flight, 16 bytes a load: twice what the latency of memory needs.
constexpr int kBlocksPerSm = 4;
constexpr int kSumsInFlight = 8;

// Queries of a thread block at most.
constexpr std::int64_t kMostQueries = 8;

struct FromSumsShared {
  alignas(1024) std::uint8_t rows[kFp16Parts][kRowSegments][kTileMeans][kSegmentBytes];
  HeadSums<kWarps, kTileMeans> sums;
  float factors[kTileMeans];
};

static_assert(kBlocksPerSm * (sizeof(FromSumsShared) + 1024) <= 228 * 1024);

struct FromSumsArguments {
  PagedProblem problem;
  std::int32_t block;
  int queries;    // per thread block
  float* scores;  // [T, stride]
  std::int64_t stride;
};

// The exact quotient, rounded once. Where the block is a power of two, so is its inverse.
__device__ inline float mean_of(float sum, std::int32_t block) {
  const auto keys = static_cast<float>(block);
  return (block & (block - 1)) == 0 ? sum * (1 / keys) : sum / keys;
}

// Stores the mean of a block, of which each lane has the sum of four columns, as row `row`.
__device__ void store_row(FromSumsShared& shared, int row, const GroupSum& sum,
                          std::int32_t block) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = fp16_scale(sum.largest);
  std::uint32_t pairs[kFp16Parts][2];
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const Fp16Mean first(mean_of(sum.sum[2 * p], block) * scale);
    const Fp16Mean second(mean_of(sum.sum[2 * p + 1], block) * scale);
#pragma unroll
    for (int part = 0; part < kFp16Parts; ++part) {
      pairs[part][p] = __half_as_ushort(first.parts[part]) | __half_as_ushort(second.parts[part])
                                                                 << 16;
    }
  }
  const int index = operand_index(lane * kLaneColumns, kDim);  // of the first pair; the other: + 8
  const int segment = index * 2 / kSegmentBytes;
  const int chunk = index / 8 % kSegmentChunks;
#pragma unroll
  for (int part = 0; part < kFp16Parts; ++part) {
    std::uint8_t* const out = shared.rows[part][segment][row] + index % 8 * 2;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      *reinterpret_cast<std::uint32_t*>(out + (chunk + p ^ row % kSegmentChunks) * 16) =
          pairs[part][p];
    }
  }
  if (lane == 0) {
    shared.factors[row] = 1 / scale;
  }
}

// Step 1 for the warp's rows of a tile of `count` blocks, the first of which begins with key
// `token`. Its groups follow each other, and those of consecutive rows.
__device__ void fill_rows(FromSumsShared& shared, const DevicePagedSource& keys, std::int32_t block,
                          std::int64_t token, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int32_t row_groups = block / kGroupSize;
  int row = static_cast<int>(threadIdx.x) / 32 * kWarpMeans;
  const int rows = min(max(count - row, 0), kWarpMeans);
  const std::int64_t first_token = token + std::int64_t{row} * block;
  const std::int32_t groups = rows * row_groups;
  std::int32_t missing = row_groups;  // groups of the row that are not added yet
  GroupSum sum{};
#pragma unroll 1
  for (std::int32_t first = 0; first < groups; first += 32) {
    const int in_round = min(32, groups - first);
    GroupPlace place{-1, 0};  // of the lane's group
    std::uint32_t largest = 0;
    if (lane < in_round) {
      place = group_place(keys, first_token + std::int64_t{first + lane} * kGroupSize);
      largest = group_largest(keys, place);
    }
#pragma unroll 1
    for (int i = 0; i < in_round; i += kSumsInFlight) {
      float4 sums[kSumsInFlight];
#pragma unroll
      for (int j = 0; j < kSumsInFlight; ++j) {
        const GroupPlace other{__shfl_sync(kFullMask, place.page, i + j),
                               __shfl_sync(kFullMask, place.in_page, i + j)};
        if (i + j < in_round) {
          sums[j] = group_sum(keys, other, lane * kLaneColumns);
        }
      }
#pragma unroll
      for (int j = 0; j < kSumsInFlight; ++j) {
        if (i + j >= in_round) {
          break;
        }
        sum.sum[0] = __fadd_rn(sum.sum[0], sums[j].x);
        sum.sum[1] = __fadd_rn(sum.sum[1], sums[j].y);
        sum.sum[2] = __fadd_rn(sum.sum[2], sums[j].z);
        sum.sum[3] = __fadd_rn(sum.sum[3], sums[j].w);
        sum.largest = max(sum.largest, __shfl_sync(kFullMask, largest, i + j));
        if (--missing == 0) {
          store_row(shared, row, sum, block);
          ++row;
          missing = row_groups;
          sum = {};
        }
      }
    }
  }
}

template <int query_warps>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sm90_scores_from_sums_kernel(const __grid_constant__ FromSumsArguments arguments) {
  begin_kernel();
  constexpr int kRoundQueries = kWarps / query_warps;
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<FromSumsShared*>(memory);
  const PagedProblem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const int warp = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 32, 0);
  const int slot = warp / query_warps;
  const int first_head = warp % query_warps * kMmaHeads;
  const int slot_thread = static_cast<int>(threadIdx.x) % (query_warps * 32);

  const Range range = range_of_lane(problem.k, t0, queries);
  const std::int32_t blocks = range.length / arguments.block;
  for (int first = 0, end = 0; first < queries; first = end) {
    const QueryRun run(first, range, blocks);
    end = run.end;
    const TileShare share(run.max_blocks, kTileMeans);
    for (std::int32_t tile = share.first; tile < share.end; tile += kTileMeans) {
      fill_rows(shared, problem.k, arguments.block,
                run.sequence_start + std::int64_t{tile} * arguments.block,
                min(kTileMeans, share.end - tile));
      ptx::fence_proxy_async(ptx::space_shared);
      __syncthreads();
      for (int round = first; round < end; round += kRoundQueries) {
        const int query = round + slot;
        const std::int64_t t = t0 + query;
        const int count =  // of the query's blocks in the tile
            min(kTileMeans, __shfl_sync(kFullMask, run.lane_blocks, query) - tile);
        Sm90HeadOperands heads;
        LaneHeads lane_heads;
        if (query < end) {
          heads.load(problem.q, t, first_head);
          lane_heads.load(problem, t, first_head);
        }
        float x[kTileMeans / 2];
        wgmma_fence();
#pragma unroll
        for (int part = kFp16Parts - 1; part >= 0; --part) {  // step 2
          start_product(shared.rows[part], heads, part < kFp16Parts - 1, x);
        }
        end_products(x);
        shared.sums.store(warp, lane_heads, x);  // step 3
        __syncthreads();
        for (int block = slot_thread; block < count; block += query_warps * 32) {
          arguments.scores[t * arguments.stride + tile + block] =
              shared.sums.template score<query_warps>(slot, block) * shared.factors[block];
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace

void launch_scores_from_sums_sm90(const PagedProblem& problem, std::int32_t block, float* scores,
                                  std::int64_t stride, int num_sms, cudaStream_t stream) {
  const std::int64_t tokens = problem.q.tokens;
  const std::int64_t queries =
      std::clamp<std::int64_t>(tokens / problem.k.sequences, 1, kMostQueries);
  const dim3 grid = shared_tiles_grid((tokens + queries - 1) / queries, stride, kTileMeans,
                                      std::int64_t{num_sms} * kBlocksPerSm);
  launch_kernel("block scores from sums",
                warps_of_query(problem.q.heads) == 2 ? sm90_scores_from_sums_kernel<2>
                                                     : sm90_scores_from_sums_kernel<4>,
                grid, kThreads, sizeof(FromSumsShared), stream,
                FromSumsArguments{problem, block, static_cast<int>(queries), scores, stride});
}

}  // namespace misa::cuda::filter
