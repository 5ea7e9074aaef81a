// SPDX-License-Identifier: Apache-2.0
// Heads of queries times block means or sampled keys on Hopper: e4m3 queries and keys, D = 128, at
// most 64 heads. A warp has 16 heads of a query in registers, in fp16, and a warpgroup one product:
// of a query's heads, or, if those are no more than 32, of two queries'. A block of threads, four
// warpgroups, shares the means of blocks of one sequence, tile by tile, or its sampled keys.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "cuda/heads.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90.hpp"

namespace misa::cuda {

// Warps of a warpgroup, and of the four that a block of threads has: as an SM's registers allow,
// for a thread has 32 of operands and up to 64 of sums.
inline constexpr int kGroupWarps = 4;
inline constexpr int kGroupsWarps = 4 * kGroupWarps;
inline constexpr int kGroupsThreads = kGroupsWarps * 32;

// A tile is cut along D into rows of 128 bytes, as products read it.
inline constexpr int kHalves = 2;
inline constexpr int kRowBytes = kDim / kHalves * 2;
inline constexpr int kRowChunks = kRowBytes / 16;

// 16 heads a warp.
using Heads = HeadRows<DType::e4m3, true, kDim, 1>;

// What a thread is in a block that serves several queries at a time, `query_warps` warps each.
template <int query_warps>
struct Place {
  static constexpr int kAtOnce = kGroupsWarps / query_warps;         // queries
  static constexpr int kProductQueries = kGroupWarps / query_warps;  // of them in one product

  int warp;  // the same for a whole warp, and the compiler is to know it
  int lane;
  int query;       // of those at a time
  int first_head;  // of the warp's 16

  __device__ Place()
      : warp(__shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 32, 0)),
        lane(static_cast<int>(threadIdx.x) % 32),
        query(warp / query_warps),
        first_head(warp % query_warps * kTileHeads) {}

  // Whether the query of this lane, which is number `slot` of those at a time, is in the product of
  // this warp. Warps of a warpgroup have to agree on whether they multiply.
  [[nodiscard]] __device__ bool shares(int slot) const {
    return slot >= 0 && slot / kProductQueries == query / kProductQueries;
  }
};

// Warps that a query's heads take.
inline int warps_of_query(std::int64_t heads) { return heads <= kMaxRows / 2 ? 2 : 4; }

// Tiles in shared memory: while one is multiplied the next one arrives.
template <int blocks>
struct BlockTiles {
  alignas(1024) std::uint8_t rows[2][kFp16Parts][kHalves][blocks][kRowBytes];
  alignas(16) std::uint16_t computed[kGroupsWarps][kFp16Parts][kDim];
  float factors[2][blocks];

  // Where 16 bytes of a row go, of both its parts.
  __device__ std::uint8_t* place(int buffer, int row, int chunk) {
    const int part = chunk / (kHalves * kRowChunks);
    const int half = chunk / kRowChunks % kHalves;
    return rows[buffer][part][half][row] + (chunk % kRowChunks ^ row % kRowChunks) * 16;
  }
};

// Computes row `row` of a tile, the mean of the block that begins at `token`. A warp works. Not
// inlined: where it is, kernels that never come here are slower for its code.
template <int blocks>
__device__ __noinline__ void compute_row(BlockTiles<blocks>& tiles, int buffer, int row,
                                         const Keys& keys, const BlockMeans& means,
                                         std::int64_t token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint16_t* const computed = tiles.computed[threadIdx.x / 32][0];
  const float factor = write_mean<true>(keys, means, token, computed, kDim);
  __syncwarp();
  *reinterpret_cast<uint4*>(tiles.place(buffer, row, lane)) =
      *reinterpret_cast<const uint4*>(&computed[lane * 8]);
  if (lane == 0) {
    tiles.factors[buffer][row] = factor;
  }
  __syncwarp();
}

// Starts copies of blocks first … first + count - 1 of the sequence that starts at `start`, a warp
// a row and a lane 16 bytes of it. A row of the pool's table that holds another sequence's block is
// computed.
template <int blocks>
__device__ void load_tile(BlockTiles<blocks>& tiles, int buffer, const Keys& keys,
                          const BlockMeans& means, std::int32_t start, std::int32_t first,
                          int count) {
  constexpr int kRows = blocks / kGroupsWarps;  // of a warp
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row0 = std::int64_t{start} / means.block + first;

  const auto [wanted, listed] =
      ask_table<kRows, kGroupsWarps>(means, start, row0, count, tiles.factors[buffer]);
  const std::uint32_t copied = __ballot_sync(kFullMask, listed);
  const std::uint32_t there = __ballot_sync(kFullMask, wanted);
#pragma unroll 1
  for (int i = 0; i < kRows && (there >> i & 1) != 0; ++i) {
    const int row = warp + i * kGroupsWarps;
    if ((copied >> i & 1) != 0) {
      copy_16(tiles.place(buffer, row, lane), means.blocks + ((row0 + row) * 32 + lane) * 8);
    } else {
      compute_row(tiles, buffer, row, keys, means, start + std::int64_t{first + row} * means.block);
    }
  }
}

// Starts x (+)= heads . rows of a tile in fp16.
template <int columns>
__device__ void start_product(const std::uint8_t (&rows)[kHalves][columns][kRowBytes],
                              const Heads& heads, bool add, float (&x)[columns / 2]) {
  constexpr int kSteps = kDim / kStep;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    wgmma_fp16<columns>(x, heads.a[0][0][s],
                        swizzled_tile(rows[s / (kSteps / kHalves)]) + 2 * (s % (kSteps / kHalves)),
                        add || s > 0);
  }
}

// Ends products started since wgmma_fence.
template <int count>
__device__ void end_products(float (&x)[count]) {
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(x);
}

// x = heads . means of a tile, the low parts of the means first.
template <int blocks>
__device__ void multiply(const BlockTiles<blocks>& tiles, int buffer, const Heads& heads,
                         float (&x)[blocks / 2]) {
  wgmma_fence();
#pragma unroll
  for (int part = kFp16Parts - 1; part >= 0; --part) {
    start_product(tiles.rows[buffer][part], heads, part < kFp16Parts - 1, x);
  }
  end_products(x);
}

}  // namespace misa::cuda
