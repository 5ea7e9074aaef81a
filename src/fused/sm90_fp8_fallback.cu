// SPDX-License-Identifier: Apache-2.0
// The exact top k of the fallback rows: queries of which too few scores passed the gate threshold,
// or more than their lists hold. All their scores are computed and written to global memory, and
// the top k is selected from them.
//
//  1. Take up to four fallback rows as a query group, one for each lane of a quad. If there are
//     fewer groups than thread blocks, divide the keys of a group into splits for several blocks.
//  2. Each warpgroup of a thread block takes tiles of 64 keys that some query of the group sees,
//     and multiplies them with the rows of all four queries.
//  3. Write the scores, which have the same bits as those of the fused kernel
//     (score/sm90_fp8_rows.cuh), to the group's score buffer in global memory.
//  4. The thread block that finishes the last split of a group selects from each of its queries'
//     scores (select/row.cuh).
//
// Usually there are no fallback rows, and every thread block returns at once.
#include <cuda_runtime.h>

#include <algorithm>
#include <cuda/ptx>
#include <limits>
#include <type_traits>

#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "fused/sm90_fp8.hpp"
#include "fused/sm90_fp8_config.cuh"
#include "misa/error.hpp"
#include "score/sm90_fp8_rows.cuh"
#include "select/row.cuh"

namespace misa::cuda::fused {
namespace {

namespace ptx = ::cuda::ptx;

static_assert(kFallbackThreads == select::kThreads);

struct FallbackArguments {
  Problem problem;
  score::ActiveRows rows;
  const float* scales;  // of all keys
  select::FallbackRows fallback;
  TopK out;
  select::RowPlan plan;
  float* scores;  // [score_buffers, group_queries, stride]
  std::int64_t stride;
  std::int64_t score_buffers;  // at least one per thread block
  int group_queries;           // 1 to kFallbackQueries
};

// Step 2: a warpgroup loads 64 keys from `first` on as the A operand; zero after the last key.
template <class Source>
__device__ void load_keys(const Source& keys, std::int64_t first, int thread, std::uint8_t* tile) {
#pragma unroll
  for (int i = 0; i < kProductKeys * kDim / 16 / kWarpgroupThreads; ++i) {
    const int row = (i * kWarpgroupThreads + thread) / 8;
    const int chunk = thread % 8;
    const std::int64_t key = first + row;
    const std::byte* source = key_address<DType::e4m3>(keys, key);
    const uint4 bytes = key < keys.tokens ? __ldg(reinterpret_cast<const uint4*>(source) + chunk)
                                          : make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(tile + row * kDim + (chunk ^ row % 8) * 16) = bytes;
  }
}

// Steps 2 and 3 of one warpgroup.
template <int rows, bool residual>
__device__ void score_split(const FallbackArguments& arguments, FallbackShared& shared,
                            std::int64_t split, std::int64_t splits, float* scores) {
  constexpr int kColumns = std::min(kFallbackQueries * rows, kProductColumns);  // of a product
  constexpr int kProducts = kFallbackQueries * rows / kColumns;
  constexpr int kColumnsPerThread = kColumns / 4;
  const DeviceRaggedSource& keys = arguments.problem.k;
  const int warpgroup =
      __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int lane = thread % 32;
  std::int32_t first = std::numeric_limits<std::int32_t>::max();
  std::int32_t end = 0;
  for (int i = 0; i < kFallbackQueries; ++i) {
    if (shared.lengths[i] > 0) {
      first = min(first, shared.starts[i]);
      end = max(end, shared.starts[i] + shared.lengths[i]);
    }
  }
  const std::int32_t start = shared.starts[lane % 4];
  const std::int32_t length = shared.lengths[lane % 4];
  float* const query_scores = scores + lane % 4 * arguments.stride;
  const std::uint64_t key_tile = swizzled_tile(shared.keys[warpgroup]);
  const std::uint64_t row_tile = swizzled_tile(shared.rows);
  for (std::int64_t first_tile = first / kProductKeys + split * kFallbackWarpgroups;
       first_tile * kProductKeys < end; first_tile += splits * kFallbackWarpgroups) {
    const std::int64_t tile = first_tile + warpgroup;  // may lie after the last one
    load_keys(keys, tile * kProductKeys, thread, shared.keys[warpgroup]);
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    const std::int64_t row = tile * kProductKeys + thread / 32 * 16 + lane / 4;
    float scales[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scales[r] = row + 8 * r < end ? __ldg(arguments.scales + row + 8 * r) : 0;
    }
    const auto write = [&](int /*query*/, int r, float score) {
      const std::int64_t position = row + 8 * r - start;
      if (position >= 0 && position < length) {
        query_scores[position] = score;
      }
    };
    float partial[2];
    const auto score_product = [&]<int product>(std::integral_constant<int, product>) {
      constexpr int kFirstColumn = product * kColumns;
      float sums[kColumns / 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<kColumns>(sums, key_tile + 2 * k, row_tile + kFirstColumn * kDim / 16 + 2 * k,
                             k > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(sums);
      score::weighted_relu_sum<rows, residual, product * kColumnsPerThread, false,
                               kColumnsPerThread>(
          sums, score::SharedWeights(shared.weights[product], lane), scales, partial, write);
    };
    score_product(std::integral_constant<int, 0>{});
    if constexpr (kProducts == 2) {
      score_product(std::integral_constant<int, 1>{});
    }
    __syncthreads();  // before the tile is overwritten
  }
}

template <int rows, bool residual>
__global__ void __launch_bounds__(kFallbackThreads, 1)
    fallback_kernel(const __grid_constant__ FallbackArguments arguments) {
  begin_kernel();
  extern __shared__ __align__(1024) std::byte memory[];
  FallbackShared& shared = *reinterpret_cast<FallbackShared*>(memory);
  __shared__ bool finishes_group;
  const auto count = static_cast<std::int64_t>(*arguments.fallback.count);
  const std::int64_t groups = (count + arguments.group_queries - 1) / arguments.group_queries;
  // The splits of a group share its score buffer. If there are more groups than buffers, each
  // thread block has a buffer instead, and groups are not split.
  const bool group_has_buffer = groups <= arguments.score_buffers;
  const std::int64_t splits =
      group_has_buffer && groups > 0 ? max(std::int64_t{gridDim.x} / groups, std::int64_t{1}) : 1;
  for (std::int64_t item = blockIdx.x; item < groups * splits; item += gridDim.x) {
    const std::int64_t group = item / splits;
    float* const scores = arguments.scores + (group_has_buffer ? group : std::int64_t{blockIdx.x}) *
                                                 arguments.group_queries * arguments.stride;
    if (threadIdx.x < kFallbackQueries) {  // step 1
      const std::int64_t i = group * arguments.group_queries + threadIdx.x;
      const bool exists = static_cast<int>(threadIdx.x) < arguments.group_queries && i < count;
      const std::int64_t t = exists ? arguments.fallback.rows[i] : -1;
      const Range range = exists ? visible(arguments.problem.k, t) : Range{0, 0};
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
    score_split<rows, residual>(arguments, shared, item % splits, splits, scores);
    if (splits > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        finishes_group = atomicAdd(&arguments.fallback.finished_splits[group], 1U) == splits - 1;
      }
      __syncthreads();
      if (!finishes_group) {
        continue;
      }
      __threadfence();
    }
    // Selection overwrites this shared memory.
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
                     std::span<float> scores, const DeviceTraits& device, void* stream) {
  const std::int64_t stride = std::max(problem.k.max_keys, 1);
  const std::int64_t capacity = static_cast<std::int64_t>(scores.size()) / stride;
  if (capacity < 1) {
    throw Error(ErrorCode::internal, "fallback rows: no room for one query's scores");
  }
  const auto group_queries = static_cast<int>(std::min<std::int64_t>(capacity, kFallbackQueries));
  const std::int64_t blocks = std::min<std::int64_t>(capacity / group_queries, device.num_sms);
  const select::RowPlan plan = select::plan_row(top_k, device.shared_bytes);
  score::for_rows(rows, [&]<int padded, bool residual>() {
    launch_kernel("fallback rows", fallback_kernel<padded, residual>,
                  dim3(static_cast<unsigned>(blocks)), kFallbackThreads,
                  std::max(sizeof(FallbackShared), plan.bytes()), stream,
                  FallbackArguments{problem, rows, scales, fallback, out, plan, scores.data(),
                                    stride, capacity / group_queries, group_queries});
  });
}

}  // namespace misa::cuda::fused
