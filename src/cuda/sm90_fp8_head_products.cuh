// SPDX-License-Identifier: Apache-2.0
// Products of query heads with block means or sampled keys on Hopper: e4m3 queries and keys, D =
// 128, at most 64 heads. A thread block has four warpgroups, which share tiles of block means or
// sampled keys in shared memory. A warp holds 16 heads of a query in registers, in fp16. One wgmma
// of a warpgroup multiplies all heads of a query or, if there are at most 32, of two queries.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "cuda/heads.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90.hpp"

namespace misa::cuda {

// A thread block has four warpgroups: a thread needs 32 registers for operands and up to 64 for
// accumulators, and an SM has 128 registers for each of 512 threads.
inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kSm90Warps = 4 * kWarpgroupWarps;
inline constexpr int kSm90Threads = kSm90Warps * 32;

// A row of a tile, D elements in fp16, is stored in two segments of 128 bytes, the width of wgmma's
// swizzle, and copied in chunks of 16 bytes.
inline constexpr int kRowSegments = 2;
inline constexpr int kSegmentBytes = kDim / kRowSegments * 2;
inline constexpr int kSegmentChunks = kSegmentBytes / 16;

// The 16 heads of a warp.
using Sm90HeadOperands = HeadOperands<DType::e4m3, true, kDim, 1>;

// Which heads of which query a warp multiplies, in a thread block that processes several queries
// per round with `query_warps` warps each.
template <int query_warps>
struct WarpAssignment {
  static constexpr int kRoundQueries = kSm90Warps / query_warps;
  static constexpr int kProductQueries = kWarpgroupWarps / query_warps;  // queries in one product

  int warp;  // from a shuffle, so that the compiler knows it is the same in all lanes
  int lane;
  int slot;        // index of the query in the round
  int first_head;  // of the warp's 16

  __device__ WarpAssignment()
      : warp(__shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / 32, 0)),
        lane(static_cast<int>(threadIdx.x) % 32),
        slot(warp / query_warps),
        first_head(warp % query_warps * kMmaHeads) {}

  // Whether the query with index `other_slot` in the round is in the same product as the warp's
  // query. All warps of a warpgroup must decide alike whether to multiply.
  [[nodiscard]] __device__ bool in_product(int other_slot) const {
    return other_slot >= 0 && other_slot / kProductQueries == slot / kProductQueries;
  }
};

// How many warps hold the heads of one query.
inline int warps_of_query(std::int64_t heads) { return heads <= kMaxRows / 2 ? 2 : 4; }

// Two tiles of block means in shared memory: one is multiplied while the next is copied.
template <int means>
struct MeanTiles {
  alignas(1024) std::uint8_t rows[2][kFp16Parts][kRowSegments][means][kSegmentBytes];
  alignas(16) std::uint16_t computed[kSm90Warps][kFp16Parts][kDim];  // compute_row's scratch
  float factors[2][means];

  // Where chunk `chunk` of a row goes; chunks of the second part follow those of the first.
  __device__ std::uint8_t* chunk_address(int buffer, int row, int chunk) {
    const int part = chunk / (kRowSegments * kSegmentChunks);
    const int segment = chunk / kSegmentChunks % kRowSegments;
    return rows[buffer][part][segment][row] + (chunk % kSegmentChunks ^ row % kSegmentChunks) * 16;
  }
};

// Computes the mean of the block whose first key is `token` as row `row` of a tile. All lanes of a
// warp call. Not inlined: the inlined code would slow down kernels that never call it.
template <int means, class Source>
__device__ __noinline__ void compute_row(MeanTiles<means>& tiles, int buffer, int row,
                                         const Source& keys, const BlockMeanTable& table,
                                         std::int64_t token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint16_t* const computed = tiles.computed[threadIdx.x / 32][0];
  const float factor = write_mean<true>(keys, table, token, computed, kDim);
  __syncwarp();
  *reinterpret_cast<uint4*>(tiles.chunk_address(buffer, row, lane)) =
      *reinterpret_cast<const uint4*>(&computed[lane * 8]);
  if (lane == 0) {
    tiles.factors[buffer][row] = factor;
  }
  __syncwarp();
}

// Starts to copy the means of blocks first … first + count - 1 of a sequence into a tile, one row
// per warp and one chunk per lane at a time. Where a table row holds the block of another sequence,
// the mean is computed.
template <int means, class Source>
__device__ void load_mean_tile(MeanTiles<means>& tiles, int buffer, const Source& keys,
                               const BlockMeanTable& table, std::int32_t sequence_start,
                               std::int32_t first, int count) {
  constexpr int kWarpRows = means / kSm90Warps;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t first_row = base_row(table, std::int64_t{sequence_start}) + first;

  const auto [wanted, found] = look_up_rows<kWarpRows, kSm90Warps>(table, sequence_start, first_row,
                                                                   count, tiles.factors[buffer]);
  const std::uint32_t found_rows = __ballot_sync(kFullMask, found);
  const std::uint32_t wanted_rows = __ballot_sync(kFullMask, wanted);
#pragma unroll 1
  for (int i = 0; i < kWarpRows && (wanted_rows >> i & 1) != 0; ++i) {
    const int row = warp + i * kSm90Warps;
    if ((found_rows >> i & 1) != 0) {
      copy_16(tiles.chunk_address(buffer, row, lane),
              table.rows + ((first_row + row) * 32 + lane) * 8);
    } else {
      compute_row(tiles, buffer, row, keys, table,
                  sequence_start + std::int64_t{first + row} * table.block);
    }
  }
}

// Starts x (+)= heads . rows of a tile, in fp16.
template <int columns>
__device__ void start_product(const std::uint8_t (&rows)[kRowSegments][columns][kSegmentBytes],
                              const Sm90HeadOperands& heads, bool add, float (&x)[columns / 2]) {
  constexpr int kDepths = kDim / kMmaDepth;
  constexpr int kSegmentDepths = kDepths / kRowSegments;
#pragma unroll
  for (int s = 0; s < kDepths; ++s) {
    wgmma_fp16<columns>(x, heads.a[0][0][s],
                        swizzled_tile(rows[s / kSegmentDepths]) + 2 * (s % kSegmentDepths),
                        add || s > 0);
  }
}

// Waits for the products started since wgmma_fence.
template <int count>
__device__ void end_products(float (&x)[count]) {
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(x);
}

// x = heads . means of a tile, the low parts of the means first.
template <int means>
__device__ void multiply_means(const MeanTiles<means>& tiles, int buffer,
                               const Sm90HeadOperands& heads, float (&x)[means / 2]) {
  wgmma_fence();
#pragma unroll
  for (int part = kFp16Parts - 1; part >= 0; --part) {
    start_product(tiles.rows[buffer][part], heads, part < kFp16Parts - 1, x);
  }
  end_products(x);
}

}  // namespace misa::cuda
