// SPDX-License-Identifier: Apache-2.0
// Sampled routing on Hopper: e4m3 queries and keys, D = 128, at most 64 heads. A block of threads
// serves up to 16 consecutive queries, four at a time, a warpgroup each, or eight of up to 32
// heads. The steps are those of sampled.cu, with these differences:
//
//  1. Lane l of every warp knows what query l sees, hence its grid. The sampled keys are a tile of
//     wgmma in fp16; once it is there, warpgroups do not wait for each other.
//  2. A product of wgmma has all heads and samples of a query, or of two; a lane holds what
//     mma.sync would give it. The heads of the warp's next query are fetched while this one's are
//     fitted.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/heads.cuh"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "route/sampled.cuh"
#include "route/sm90_fp8_sampled.hpp"

namespace misa::cuda::route {
namespace {

namespace ptx = ::cuda::ptx;

constexpr int kSamples = static_cast<int>(kMaxSamples);

struct Shared {
  alignas(1024) std::uint8_t rows[kHalves][kSamples][kRowBytes];
  SampleShared samples;
};

// Step 1. A lane has 16 bytes of a key.
__device__ void load_samples(Shared& shared, const Keys& keys, std::int32_t start, int shift,
                             int count) {
  constexpr int kLanes = kDim / 16;  // of a key
  constexpr int kKeys = kGroupsThreads / kLanes;
  constexpr int kTimes = kSamples / kKeys;
  static_assert(kKeys % kRowChunks == 0);  // a thread's rows are swizzled alike
  int thread = static_cast<int>(threadIdx.x);
  // Addresses are worked out anew each time: kept, they would take registers of products.
  asm volatile("" : "+r"(thread));
  const int first = thread / kLanes;
  const int piece = thread % kLanes;
  Elements<DType::e4m3, 16> elements[kTimes];
  float scale[kTimes];
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const int sample = first + i * kKeys;
    elements[i].clear();
    scale[i] = 0;
    if (sample < count) {
      const std::int64_t token = start + (std::int64_t{sample} << shift);
      elements[i].load(static_cast<const std::byte*>(keys.data) + token * keys.stride, piece * 16);
      scale[i] = __ldg(keys.scale + token);
    }
  }
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const int sample = first + i * kKeys;
    float squares = 0;
#pragma unroll
    for (int four = 0; four < 4; ++four) {
      float value[4];
      elements[i].floats(four, value);
      squares = add_squares(squares, value, scale[i]);
      std::uint32_t pairs[2];
      elements[i].fp16(four, pairs);
#pragma unroll
      for (int p = 0; p < 2; ++p) {  // where operand_place has them
        std::uint8_t* const row = shared.rows[piece % kHalves][sample] + piece / kHalves * 4;
        const int chunk = 2 * four + p;
        *reinterpret_cast<std::uint32_t*>(row + (chunk ^ first % kRowChunks) * 16) = pairs[p];
      }
    }
    squares = sum_of_lanes<kLanes>(squares);
    if (piece == 0) {
      shared.samples.scale[sample] = scale[i];
      shared.samples.squares[sample] = squares;
    }
  }
}

template <int query_warps>
__global__ void __launch_bounds__(kGroupsThreads, 1)
    sampled_kernel(const __grid_constant__ SampledArguments arguments) {
  begin_kernel();
  using Own = Place<query_warps>;
  static_assert(kQueries + Own::kAtOnce <= 32);  // there is a lane for every query, and one without
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const Own place;
  const auto [warp, lane, query, first_head] = place;

  Heads::Raw next = {};
  if (query < queries) {
    Heads::fetch(problem.q, t0 + query, first_head, next);
  }
  const Range range = range_of_lane(problem.k, t0, queries);
  const Grid grid(range);
  for (int first = 0, end = 0; first < queries; first = end) {
    const std::int32_t start = __shfl_sync(kFullMask, grid.start, first);
    const int shift = __shfl_sync(kFullMask, grid.shift, first);
    end = end_of_run(first, grid.start != start || grid.shift != shift);
    const bool listed = first <= lane && lane < end;
    load_samples(shared, problem.k, start, shift,
                 __reduce_max_sync(kFullMask, listed ? grid.count : 0));
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    for (int round = first; round < end; round += Own::kAtOnce) {
      const int slot = round + query;
      const int count = __shfl_sync(kFullMask, grid.count, slot);
      const Range own_range{start, __shfl_sync(kFullMask, range.length, slot)};
      const bool working = slot < end && count > 0;
      const bool multiplying =
          __any_sync(kFullMask, lane < end && place.shares(lane - round) && grid.count > 0) != 0;
      Heads heads;
      heads.take(next);
      float own[2] = {};
      float weight[2] = {};
      Products x;
      if (multiplying) {
        if (working) {
          load_weights(problem, t0 + slot, first_head, weight);
          judge_alone(arguments, heads, own_range, own);
        }
        wgmma_fence();
        start_product(shared.rows, heads, false, x);
        end_products(x);
      }
      const int next_slot = min(round + Own::kAtOnce, end) + query;
      if (next_slot < queries) {
        Heads::fetch(problem.q, t0 + next_slot, first_head, next);
      }
      if (working) {
        scale_products(shared.samples, count, x);
        const Fit result = fit(x, count, arguments.router != Router::dispersion);
        write_values(shared.samples, arguments, slot, first_head, result,
                     entry_rms(shared.samples, count, kDim), own, weight);
      }
    }
    __syncthreads();
  }

  for (int slot = warp; slot < queries; slot += kGroupsWarps) {
    finish<DType::e4m3, kDim, kMaxRows>(shared.samples, arguments, t0 + slot, slot);
  }
}

}  // namespace

void launch_sampled_sm90(SampledArguments arguments, int num_sms, cudaStream_t stream) {
  const std::int64_t tokens = arguments.problem.q.tokens;
  arguments.queries = queries_of_block(tokens, num_sms);
  const auto blocks = static_cast<unsigned>((tokens + arguments.queries - 1) / arguments.queries);
  launch_kernel(
      "sampled routing",
      warps_of_query(arguments.problem.q.heads) == 2 ? sampled_kernel<2> : sampled_kernel<4>,
      dim3(blocks), kGroupsThreads, sizeof(Shared), stream, arguments);
}

}  // namespace misa::cuda::route
