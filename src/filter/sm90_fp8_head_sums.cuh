// SPDX-License-Identifier: Apache-2.0
// Scores of blocks on Hopper from the products of a query's heads with block means: a thread holds
// two heads of two of every eight blocks. It stores the sum of w max(0, x) over these heads. After
// a barrier the sums that were stored for a block are added up in order. So the order of every sum
// depends only on the query's number of heads.
#pragma once

#include <cstdint>

#include "cuda/heads.cuh"
#include "cuda/problem.hpp"
#include "cuda/warp.cuh"

namespace misa::cuda::filter {

// The weights of a lane's two heads, of those from `first` on.
struct LaneHeads {
  float weight[2] = {};
  bool exists[2] = {};

  template <class Source>
  __device__ void load(const ProblemOf<Source>& problem, std::int64_t t, int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first + half * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
      exists[half] = head < problem.q.heads;
      weight[half] = exists[half] ? problem.w.data[t * problem.w.token_stride + head] : 0;
    }
  }
};

// What `warps` warps, of 16 heads each, store for the blocks of a tile.
template <int warps, int means>
struct HeadSums {
  // A warp stores a sum for every two of its heads. The pitch puts rows of sums in different banks.
  static constexpr int kWarpSums = kMmaHeads / 2;
  static constexpr int kPitch = means + 8;

  alignas(16) float sums[warps * kWarpSums][kPitch];

  __device__ void store(int warp, const LaneHeads& heads, const float (&x)[means / 2]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float* const row = sums[warp * kWarpSums + lane / 4] + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < means / 8; ++j) {
      float sum[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float clipped = max_nan(x[4 * j + 2 * half + e], 0);
          sum[e] = heads.exists[half] ? __fmaf_rn(heads.weight[half], clipped, sum[e]) : sum[e];
        }
      }
      *reinterpret_cast<float2*>(row + 8 * j) = make_float2(sum[0], sum[1]);
    }
  }

  // The sum over all heads of the query in a slot, whose heads `query_warps` warps hold.
  template <int query_warps>
  __device__ float score(int slot, int block) const {
    float score = 0;
#pragma unroll
    for (int i = 0; i < query_warps * kWarpSums; ++i) {
      score += sums[slot * query_warps * kWarpSums + i][block];
    }
    return score;
  }
};

}  // namespace misa::cuda::filter
