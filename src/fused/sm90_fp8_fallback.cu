// SPDX-License-Identifier: Apache-2.0
// The exact top k of queries whose threshold let through too few scores, or more than their lists
// hold. Such a query depends on no threshold: all its scores are written and selected from.
//
//  1. Four queries of the list make a group, one for each lane of a quad. Where there are fewer
//     groups than blocks, a group's keys are cut into parts, a block each.
//  2. A block's warpgroups share the keys of its part that some of the four see, in tiles of 64,
//     and multiply each with the rows of all four.
//  3. Scores, with the bits that the fused kernel gives them (score/sm90_fp8_rows.cuh), go to the
//  group's room
//     in global memory.
//  4. The block that finishes a group's last part selects from each of the four rows
//     (select/row.cuh).
//
// Blocks find no work and end where nothing was fallback, which is the rule.
#include <cuda_runtime.h>

#include <algorithm>
#include <cuda/ptx>
#include <limits>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/range.cuh"
#include "fused/sm90_fp8.hpp"
#include "fused/sm90_fp8_config.cuh"
#include "misa/error.hpp"
#include "score/sm90_fp8_rows.cuh"
#include "select/row.cuh"

namespace misa::cuda::fused {
namespace {

namespace ptx = ::cuda::ptx;

static_assert(kFallbackThreads == select::kThreads);

struct Arguments {
  Problem problem;
  score::ActiveRows rows;
  const float* scales;  // of all keys
  select::FallbackRows fallback;
  TopK out;
  select::RowPlan plan;
  float* room;  // [rooms, queries, stride] scores
  std::int64_t stride;
  std::int64_t rooms;  // at least as many as blocks
  int queries;         // of a group: 1 to kFallbackQueries
};

// Step 2's A operand: 64 keys from `first` on, by the threads of a group; zero beyond the last key.
__device__ void load_keys(const Keys& keys, std::int64_t first, int thread, std::uint8_t* tile) {
#pragma unroll
  for (int i = 0; i < kProductKeys * kDim / 16 / kGroupThreads; ++i) {
    const int row = (i * kGroupThreads + thread) / 8;
    const int chunk = thread % 8;
    const std::int64_t key = first + row;
    const auto* source = static_cast<const std::uint8_t*>(keys.data) + key * keys.stride;
    const uint4 bytes = key < keys.tokens ? __ldg(reinterpret_cast<const uint4*>(source) + chunk)
                                          : make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(tile + row * kDim + (chunk ^ row % 8) * 16) = bytes;
  }
}

// Steps 2 and 3 of one warpgroup.
template <int rows, bool residual>
__device__ void score_tiles(const Arguments& arguments, FallbackShared& shared, std::int64_t part,
                            std::int64_t parts, float* scores) {
  constexpr int kFallbackColumns =
      std::min(kFallbackQueries * rows, kProductColumns);  // of a product
  constexpr int kProducts = kFallbackQueries * rows / kFallbackColumns;
  constexpr int kLocals = kFallbackColumns / 4;
  const Keys& keys = arguments.problem.k;
  const int group = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  const int thread = threadIdx.x % kGroupThreads;
  const int lane = thread % 32;
  std::int32_t first = std::numeric_limits<std::int32_t>::max();
  std::int32_t last = 0;
  for (int i = 0; i < kFallbackQueries; ++i) {
    if (shared.lengths[i] > 0) {
      first = min(first, shared.starts[i]);
      last = max(last, shared.starts[i] + shared.lengths[i]);
    }
  }
  const std::int32_t start = shared.starts[lane % 4];
  const std::int32_t length = shared.lengths[lane % 4];
  float* const own = scores + lane % 4 * arguments.stride;
  const std::uint64_t key_tile = swizzled_tile(shared.keys[group]);
  const std::uint64_t row_tile = swizzled_tile(shared.rows);
  for (std::int64_t tiles = first / kProductKeys + part * kFallbackGroups;
       tiles * kProductKeys < last; tiles += parts * kFallbackGroups) {
    const std::int64_t tile = tiles + group;  // perhaps behind the last one
    load_keys(keys, tile * kProductKeys, thread, shared.keys[group]);
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    const std::int64_t row = tile * kProductKeys + thread / 32 * 16 + lane / 4;
    float scales[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scales[r] = row + 8 * r < last ? __ldg(arguments.scales + row + 8 * r) : 0;
    }
    const auto write = [&](int /*query*/, int r, float score) {
      const std::int64_t position = row + 8 * r - start;
      if (position >= 0 && position < length) {
        own[position] = score;
      }
    };
    float partial[2];
    const auto take = [&]<int product>(std::integral_constant<int, product>) {
      constexpr int kFirst = product * kFallbackColumns;
      float sums[kFallbackColumns / 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<kFallbackColumns>(sums, key_tile + 2 * k, row_tile + kFirst * kDim / 16 + 2 * k,
                                     k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(sums);
      score::weighted_relu_sum<rows, residual, product * kLocals, false, kLocals>(
          sums, score::SharedWeights(shared.weights[product], lane), scales, partial, write);
    };
    take(std::integral_constant<int, 0>{});
    if constexpr (kProducts == 2) {
      take(std::integral_constant<int, 1>{});
    }
    __syncthreads();  // before the tile is overwritten
  }
}

template <int rows, bool residual>
__global__ void __launch_bounds__(kFallbackThreads, 1)
    fallback_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  extern __shared__ __align__(1024) std::byte memory[];
  FallbackShared& shared = *reinterpret_cast<FallbackShared*>(memory);
  __shared__ bool last_part;
  const auto count = static_cast<std::int64_t>(*arguments.fallback.count);
  const std::int64_t groups = (count + arguments.queries - 1) / arguments.queries;
  // A group's parts need a room of its own; where there is not one for each, blocks have one each.
  const bool own_rooms = groups <= arguments.rooms;
  const std::int64_t parts =
      own_rooms && groups > 0 ? max(std::int64_t{gridDim.x} / groups, std::int64_t{1}) : 1;
  for (std::int64_t item = blockIdx.x; item < groups * parts; item += gridDim.x) {
    const std::int64_t group = item / parts;
    float* const scores = arguments.room + (own_rooms ? group : std::int64_t{blockIdx.x}) *
                                               arguments.queries * arguments.stride;
    if (threadIdx.x < kFallbackQueries) {  // step 1
      const std::int64_t i = group * arguments.queries + threadIdx.x;
      const bool taken = static_cast<int>(threadIdx.x) < arguments.queries && i < count;
      const std::int64_t t = taken ? arguments.fallback.rows[i] : -1;
      const Range range = taken ? visible(arguments.problem.k, t) : Range{0, 0};
      shared.queries[threadIdx.x] = t;
      shared.starts[threadIdx.x] = range.start;
      shared.lengths[threadIdx.x] = range.length;
    }
    __syncthreads();
    score::load_rows<rows, residual, kFallbackQueries * rows>(
        arguments.problem, arguments.rows, threadIdx.x, kFallbackThreads,
        [&](int query) { return shared.queries[query]; }, shared.rows, shared.weights);
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    score_tiles<rows, residual>(arguments, shared, item % parts, parts, scores);
    if (parts > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        last_part = atomicAdd(&arguments.fallback.parts[group], 1U) == parts - 1;
      }
      __syncthreads();
      if (!last_part) {
        continue;
      }
      __threadfence();
    }
    // Selection takes the same shared memory.
    std::int64_t queries[kFallbackQueries];
    std::int32_t lengths[kFallbackQueries];
    for (int i = 0; i < kFallbackQueries; ++i) {
      queries[i] = shared.queries[i];
      lengths[i] = shared.lengths[i];
    }
    __syncthreads();
    for (int i = 0; i < kFallbackQueries; ++i) {
      if (queries[i] >= 0) {
        select::select_row(memory, arguments.plan, scores + i * arguments.stride,
                           static_cast<std::uint32_t>(lengths[i]),
                           select::output_row(arguments.out, queries[i], arguments.plan.top_k));
      }
      __syncthreads();
    }
  }
}

}  // namespace

void launch_fallback(const Problem& problem, const score::ActiveRows& rows, const float* scales,
                     const select::FallbackRows& fallback, int top_k, const TopK& out,
                     std::span<float> scores, int num_sms, void* stream) {
  const std::int64_t stride = std::max(problem.k.max_keys, 1);
  const std::int64_t room = static_cast<std::int64_t>(scores.size()) / stride;
  if (room < 1) {
    throw Error(ErrorCode::internal, "fallback queries: no room for one query's scores");
  }
  const auto queries = static_cast<int>(std::min<std::int64_t>(room, kFallbackQueries));
  const std::int64_t blocks = std::min<std::int64_t>(room / queries, num_sms);
  const select::RowPlan plan = select::plan_row(top_k, shared_limit());
  score::for_rows(rows, [&]<int padded, bool residual>() {
    launch_kernel("fallback queries", fallback_kernel<padded, residual>,
                  dim3(static_cast<unsigned>(blocks)), kFallbackThreads,
                  std::max(sizeof(FallbackShared), plan.bytes()), stream,
                  Arguments{problem, rows, scales, fallback, out, plan, scores.data(), stride,
                            room / queries, queries});
  });
}

}  // namespace misa::cuda::fused
