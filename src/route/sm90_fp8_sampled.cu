// SPDX-License-Identifier: Apache-2.0
// Sampled routing on Hopper: e4m3 queries and keys, D = 128, at most 64 heads. A thread block
// routes up to 16 consecutive queries in rounds: four queries per round, one per warpgroup, or
// eight if they have at most 32 heads. The steps are those of sampled.cu, with these differences:
//
//  1. Lane l of every warp gets the keys that query l sees, hence its grid. The sampled keys are
//     one fp16 tile, an operand of wgmma. Once the tile is loaded, warpgroups proceed
//     independently.
//  2. One wgmma multiplies all heads of a query, or of two, with all samples. A lane holds the same
//     products as after mma.sync. While heads are fitted, those of the warp's next query are
//     loaded.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm90_fp8_head_products.cuh"
#include "route/sampled.cuh"
#include "route/sm90_fp8_sampled.hpp"

namespace misa::cuda::route {
namespace {

namespace ptx = ::cuda::ptx;

constexpr int kSamples = static_cast<int>(kMaxSamples);

struct Sm90SampledShared {
  alignas(1024) std::uint8_t rows[kRowSegments][kSamples][kSegmentBytes];
  SampledShared sampled;
};

// Step 1. A lane loads 16 bytes of each of several keys.
template <class Source>
__device__ void load_samples(Sm90SampledShared& shared, const Source& keys, std::int32_t start,
                             int shift, int count) {
  constexpr int kKeyLanes = kDim / 16;
  constexpr int kKeys = kSm90Threads / kKeyLanes;  // loaded at once by the thread block
  constexpr int kLaneKeys = kSamples / kKeys;
  static_assert(kKeys % kSegmentChunks == 0);  // the swizzle is the same for all keys of a lane
  int thread = static_cast<int>(threadIdx.x);
  // Keeps the compiler from holding addresses between calls: accumulators need the registers.
  asm volatile("" : "+r"(thread));
  const int first = thread / kKeyLanes;
  const int piece = thread % kKeyLanes;
  Elements<DType::e4m3, 16> elements[kLaneKeys];
  float scale[kLaneKeys];
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    const int sample = first + i * kKeys;
    elements[i].clear();
    scale[i] = 0;
    if (sample < count) {
      const std::int64_t token = start + (std::int64_t{sample} << shift);
      elements[i].load(key_address<DType::e4m3>(keys, token), piece * 16);
      scale[i] = key_scale<DType::e4m3>(keys, token);
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneKeys; ++i) {
    const int sample = first + i * kKeys;
    float squares = 0;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      float value[4];
      elements[i].floats(group, value);
      squares = add_squares(squares, value, scale[i]);
      std::uint32_t pairs[2];
      elements[i].fp16(group, pairs);
#pragma unroll
      for (int p = 0; p < 2; ++p) {  // at operand_index of the elements
        std::uint8_t* const row =
            shared.rows[piece % kRowSegments][sample] + piece / kRowSegments * 4;
        const int chunk = 2 * group + p;
        *reinterpret_cast<std::uint32_t*>(row + (chunk ^ first % kSegmentChunks) * 16) = pairs[p];
      }
    }
    squares = lane_sum<kKeyLanes>(squares);
    if (piece == 0) {
      shared.sampled.scale[sample] = scale[i];
      shared.sampled.squares[sample] = squares;
    }
  }
}

template <int query_warps, class Source>
__global__ void __launch_bounds__(kSm90Threads, 1)
    sm90_sampled_kernel(const __grid_constant__ SampledArguments<Source> arguments) {
  begin_kernel();
  using Assignment = WarpAssignment<query_warps>;
  constexpr int kRoundQueries = Assignment::kRoundQueries;
  // Shuffles read lane round + slot, up to a round after the last query.
  static_assert(kThreadBlockQueries + kRoundQueries <= 32);
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Sm90SampledShared*>(memory);
  const ProblemOf<Source>& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const Assignment assignment;
  const auto [warp, lane, slot, first_head] = assignment;

  Sm90HeadOperands::Raw next_heads = {};
  if (slot < queries) {
    Sm90HeadOperands::fetch(problem.q, t0 + slot, first_head, next_heads);
  }
  const Range range = range_of_lane(problem.k, t0, queries);
  const SampleGrid grid(range);
  for (int first = 0, end = 0; first < queries; first = end) {
    const std::int32_t start = __shfl_sync(kFullMask, grid.start, first);
    const int shift = __shfl_sync(kFullMask, grid.shift, first);
    end = end_of_run(first, grid.start != start || grid.shift != shift);
    const bool in_run = first <= lane && lane < end;
    load_samples(shared, problem.k, start, shift,
                 __reduce_max_sync(kFullMask, in_run ? grid.count : 0));
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    for (int round = first; round < end; round += kRoundQueries) {
      const int query = round + slot;
      const int count = __shfl_sync(kFullMask, grid.count, query);
      const Range query_range{start, __shfl_sync(kFullMask, range.length, query)};
      const bool working = query < end && count > 0;
      const bool multiplying =
          __any_sync(kFullMask,
                     lane < end && assignment.in_product(lane - round) && grid.count > 0) != 0;
      Sm90HeadOperands heads;
      heads.convert(next_heads);
      float statistic[2] = {};
      float weight[2] = {};
      SampleProducts x;
      if (multiplying) {
        if (working) {
          load_weights(problem, t0 + query, first_head, weight);
          head_statistics(arguments, heads, query_range, statistic);
        }
        wgmma_fence();
        start_product(shared.rows, heads, false, x);
        end_products(x);
      }
      const int next_query = min(round + kRoundQueries, end) + slot;
      if (next_query < queries) {
        Sm90HeadOperands::fetch(problem.q, t0 + next_query, first_head, next_heads);
      }
      if (working) {
        scale_products(shared.sampled, count, x);
        const LaneFit fit = fit_products(x, count, arguments.router != Router::dispersion);
        write_values(shared.sampled, arguments, query, first_head, fit,
                     key_rms(shared.sampled, count, kDim), statistic, weight);
      }
    }
    __syncthreads();
  }

  for (int query = warp; query < queries; query += kSm90Warps) {
    write_routing<DType::e4m3, kDim, kMaxRows>(shared.sampled, arguments, t0 + query, query);
  }
}

}  // namespace

template <class Source>
void launch_sampled_sm90(SampledArguments<Source> arguments, int num_sms, cudaStream_t stream) {
  const std::int64_t tokens = arguments.problem.q.tokens;
  arguments.queries = thread_block_queries(tokens, num_sms);
  const auto grid = static_cast<unsigned>((tokens + arguments.queries - 1) / arguments.queries);
  launch_kernel("sampled routing",
                warps_of_query(arguments.problem.q.heads) == 2 ? sm90_sampled_kernel<2, Source>
                                                               : sm90_sampled_kernel<4, Source>,
                dim3(grid), kSm90Threads, sizeof(Sm90SampledShared), stream, arguments);
}

template void launch_sampled_sm90(SampledArguments<DeviceRaggedSource>, int, cudaStream_t);
template void launch_sampled_sm90(SampledArguments<DevicePagedSource>, int, cudaStream_t);

}  // namespace misa::cuda::route
