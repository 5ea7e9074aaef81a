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
#include "score/sm90_fp8_rows.cuh"

namespace misa::cuda::score {
namespace {

namespace ptx = ::cuda::ptx;

constexpr int kProducts = kGatheredProducts;
constexpr int kTile = kGatheredTile;
constexpr int kQuad = 4;
constexpr int kLaneRows = kMaxRows / kQuad;
static_assert(kLaneRows == kHeadGroup, "a lane has a group of heads");
static_assert(kWarpgroupThreads == 2 * kMaxRows, "two threads load a row");

// A key is copied in 16-byte chunks, one per thread, so that a warp copies kKeysAtOnce keys at
// once, and each thread helps to copy kThreadKeys of its warp's 32 keys.
constexpr int kChunks = kDim / 16;
constexpr int kKeysAtOnce = 32 / kChunks;
constexpr int kThreadKeys = 32 / kKeysAtOnce;
static_assert(kTile == kWarpgroupThreads, "a thread copies a scale");

struct GatheredArguments {
  Problem problem;
  ActiveRows rows;
  Columns columns;
  const std::int32_t* lengths;
  std::int32_t unscored;
  const float* scales;
  Scores scores;
};

// Step 1.
__device__ void load_query(const GatheredArguments& arguments, std::int64_t t,
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
    if (head >= 0) {
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

// Step 2 for one thread: tiles first, first + step, …. With `blocks` the entries of the list are
// blocks of positions, each a multiple of the 32 keys that a warp copies; otherwise they are single
// positions.
template <bool blocks>
class Gather {
 public:
  __device__ Gather(const GatheredArguments& arguments, std::int64_t t, std::int32_t first,
                    std::int32_t step)
      : list_(arguments.columns.list + t * arguments.columns.width),
        column_(static_cast<std::uint32_t>(first) * kTile + threadIdx.x),
        last_entry_(static_cast<std::uint32_t>(arguments.columns.width) - 1),
        step_columns_(static_cast<std::uint32_t>(step) * kTile),
        block_size_(static_cast<std::uint32_t>(arguments.columns.block)),
        key_stride_(static_cast<std::uint64_t>(key_pitch<DType::e4m3>(arguments.problem.k))) {
    const unsigned warp = threadIdx.x / 32 * 32;
    const unsigned row = warp + threadIdx.x % 32 / kChunks;
    chunk_offset_ = row * kDim + (threadIdx.x % kChunks ^ row % 8) * 16;
    entry_slot_ = warp + threadIdx.x % kKeysAtOnce * kThreadKeys + threadIdx.x % 32 / kKeysAtOnce;
    if constexpr (blocks) {
      block_index_ = (column_ - threadIdx.x % 32) / block_size_;
      block_offset_ = (column_ - threadIdx.x % 32) % block_size_;
    }
    entry_ = look_up();
  }

  // Sets the keys that the query sees, at least one. To be called before the first copy().
  __device__ void set_range(const GatheredArguments& arguments, const Range& range) {
    keys_ = reinterpret_cast<const std::uint8_t*>(
                key_address<DType::e4m3>(arguments.problem.k, range.start)) +
            threadIdx.x % kChunks * 16;
    scales_ = arguments.scales + range.start;
    last_position_ = static_cast<std::uint32_t>(range.length) - 1;
    if constexpr (!blocks) {
#pragma unroll
      for (unsigned i = 0; i < kThreadKeys; ++i) {
        positions_[i] =
            __shfl_sync(kFullMask, entry_, i * kKeysAtOnce + threadIdx.x % 32 / kChunks);
      }
    }
    // Hides the values from the compiler, so that it computes an address by one multiply-add.
    asm("" : "+l"(keys_), "+l"(scales_), "+l"(list_));
  }

  // Starts the copies of a tile and of the list entries of the tile after it. For columns after the
  // query's last one it copies some key that the query sees; its score is not stored.
  __device__ void copy(std::uint8_t* keys, float* scales, std::uint32_t* positions) {
    if constexpr (blocks) {
      const std::uint32_t base = entry_ * block_size_ + block_offset_;
      entry_ = base + threadIdx.x % 32;
#pragma unroll
      for (unsigned i = 0; i < kThreadKeys; ++i) {
        positions_[i] = base + i * kKeysAtOnce + threadIdx.x % 32 / kChunks;
      }
    }
    copy_4(scales + threadIdx.x, scales_ + min(entry_, last_position_));
#pragma unroll
    for (unsigned i = 0; i < kThreadKeys; ++i) {
      // The swizzled chunks of keys that are kKeysAtOnce apart differ in one bit.
      const std::uint32_t offset =
          (chunk_offset_ ^ i % 2 * kKeysAtOnce * 16) + i * kKeysAtOnce * kDim;
      copy_16(keys + offset,
              keys_ + std::uint64_t{min(positions_[i], last_position_)} * key_stride_);
    }
    column_ += step_columns_;
    if constexpr (blocks) {
      block_index_ += step_columns_ / block_size_;
      block_offset_ += step_columns_ % block_size_;
      if (block_offset_ >= block_size_) {
        block_offset_ -= block_size_;
        ++block_index_;
      }
      entry_ = look_up();
    } else {
      copy_4(positions + entry_slot_, list_ + min(column_, last_entry_));
    }
  }

  // Reads the list entries that copy() fetched, once they are in shared memory for the whole warp.
  __device__ void read(const std::uint32_t* positions) {
    if constexpr (!blocks) {
      const auto* vectors =
          reinterpret_cast<const uint4*>(positions + threadIdx.x / kChunks * kThreadKeys);
      const uint4 low = vectors[0];
      const uint4 high = vectors[1];
      positions_[0] = low.x;
      positions_[1] = low.y;
      positions_[2] = low.z;
      positions_[3] = low.w;
      positions_[4] = high.x;
      positions_[5] = high.y;
      positions_[6] = high.z;
      positions_[7] = high.w;
      entry_ = positions[entry_slot_];
    }
  }

 private:
  __device__ std::uint32_t look_up() const {
    return static_cast<std::uint32_t>(
        __ldg(list_ + min(blocks ? block_index_ : column_, last_entry_)));
  }

  const std::int32_t* list_;
  const std::uint8_t* keys_ = nullptr;  // the thread's chunk of the first key that the query sees
  const float* scales_ = nullptr;       // from the first key that the query sees on
  std::uint32_t last_position_ = 0;     // the last position that the query sees
  std::uint32_t column_;                // the column of the next tile whose scale the thread copies
  std::uint32_t last_entry_;            // index of the list's last entry
  std::uint32_t step_columns_;          // columns from one tile to the next
  std::uint32_t block_size_;
  std::uint64_t key_stride_;
  std::uint32_t chunk_offset_;  // in a tile: the thread's chunk of the first keys that it copies
  std::uint32_t entry_slot_;    // in `positions`: the entry of column_
  std::uint32_t entry_;  // the list's entry for column_: a position or, with `blocks`, a block
  std::uint32_t positions_[kThreadKeys];  // of the keys that the thread helps to copy
  std::uint32_t block_index_ = 0;         // with `blocks`: which entry has the warp's first column,
  std::uint32_t block_offset_ = 0;        // and which position of that block the column is
};
static_assert(2 * kKeysAtOnce == 8, "a warp copies half of a swizzle's rows at once");
static_assert(kThreadKeys == 8, "two vectors");

// Steps 2 to 4. With `nonnegative_scales` it assumes that no scale is negative, and returns whether
// some scale is, in which case the scores are wrong.
template <bool residual, bool blocks, bool nonnegative_scales>
__device__ bool score_query(const GatheredArguments& arguments, std::int64_t t,
                            GatheredShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto tile = static_cast<std::int32_t>(blockIdx.y);
  const auto step = static_cast<std::int32_t>(gridDim.y);
  Gather<blocks> gather(arguments, t, tile, step);
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
      const float scales[2] = {shared.scales[stage][key], shared.scales[stage][key + 8]};
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

template <bool residual, bool blocks>
__global__ void __launch_bounds__(kWarpgroupThreads, kGatheredBlocks)
    gathered_kernel(const __grid_constant__ GatheredArguments arguments) {
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

void launch_gathered(const Problem& problem, const ActiveRows& rows, const Columns& columns,
                     const std::int32_t* lengths, std::int32_t unscored, const float* scales,
                     const Scores& scores, int num_sms, void* stream) {
  const std::int64_t queries = problem.q.tokens;
  const std::int64_t tiles = (scores.columns + kTile - 1) / kTile;
  const std::int64_t blocks_per_query = std::clamp<std::int64_t>(
      std::int64_t{kGatheredBlocks} * num_sms / queries, 1, std::max<std::int64_t>(tiles, 1));
  const auto launch = [&]<bool residual, bool blocks>() {
    launch_kernel("gathered scores", gathered_kernel<residual, blocks>,
                  dim3(static_cast<unsigned>(queries), static_cast<unsigned>(blocks_per_query)),
                  kWarpgroupThreads, sizeof(GatheredShared), stream,
                  GatheredArguments{problem, rows, columns, lengths, unscored, scales, scores});
  };
  if (rows.residual != nullptr) {
    columns.block > 1 ? launch.template operator()<true, true>()
                      : launch.template operator()<true, false>();
  } else {
    columns.block > 1 ? launch.template operator()<false, true>()
                      : launch.template operator()<false, false>();
  }
}

}  // namespace misa::cuda::score
