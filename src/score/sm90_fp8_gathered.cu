// SPDX-License-Identifier: Apache-2.0
// Scores of listed keys, a query a block; blocks share a query's tiles of 128 keys where there are
// few queries.
//
//  1. The query's rows become the B operand, heads 16 c … 16 c + 15 in the columns that lane c of a
//     quad holds, the residual row last of all.
//  2. While a tile is scored a warp copies its 32 keys of the next one, eight threads a key, and a
//     thread the scale of one. What the list has for the tile behind that comes along, in an order
//     in which a thread finds the positions of its eight keys beside each other.
//  3. Two products of 64 keys and 64 rows leave 16 dot products of each of two keys in a thread.
//     The second is under way while the first is added up.
//  4. Each lane of a quad clips and sums its 16, a group (score/sm90_fp8_rows.cuh); two of the
//  lanes add up the
//     groups of a key each, and the residual row.
#include <cuda_runtime.h>

#include <algorithm>
#include <cuda/ptx>

#include "cuda/launch.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/range.cuh"
#include "score/sm90_fp8.hpp"
#include "score/sm90_fp8_config.cuh"
#include "score/sm90_fp8_rows.cuh"

namespace misa::cuda::score {
namespace {

namespace ptx = ::cuda::ptx;

constexpr int kProducts = kGatheredProducts;
constexpr int kTile = kGatheredTile;
constexpr int kQuad = 4;
constexpr int kOwnRows = kMaxRows / kQuad;
static_assert(kOwnRows == kGroupRows, "a lane has a group");
static_assert(kGroupThreads == 2 * kMaxRows, "two threads load a row");

// Threads that copy a key, keys that a warp copies at once, and keys of a tile that a thread helps
// to copy.
constexpr int kChunks = kDim / 16;
constexpr int kAtOnce = 32 / kChunks;
constexpr int kCopied = 32 / kAtOnce;
static_assert(kTile == kGroupThreads, "a thread copies a scale");

struct Arguments {
  Problem problem;
  ActiveRows rows;
  Columns columns;
  const std::int32_t* lengths;
  std::int32_t unscored;
  const float* scales;
  Scores scores;
};

// Step 1.
__device__ void load_query(const Arguments& arguments, std::int64_t t, GatheredShared& shared) {
  const auto& [q, w, k] = arguments.problem;
  const ActiveRows& rows = arguments.rows;
  const int column = static_cast<int>(threadIdx.x) / 2;
  const int first_chunk = static_cast<int>(threadIdx.x) % 2 * (kChunks / 2);
  const int slot = column % 8 / 2 * kOwnRows + column / 8 * 2 + column % 2;
  const std::uint8_t* source = nullptr;
  float weight = 0;
  if (slot < rows.head_count) {
    const std::int32_t head = rows.heads == nullptr ? slot : rows.heads[t * rows.head_count + slot];
    if (head >= 0) {
      source = static_cast<const std::uint8_t*>(q.data) + t * q.token_stride + head * q.head_stride;
      weight = w.data[t * w.token_stride + head];
    }
  } else if (rows.residual != nullptr && slot == kMaxRows - 1) {
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

// Step 2 for a thread, from tile `first` on by `step` tiles. `blocks`: the list is of blocks of
// positions, not of positions; a block is a multiple of the 32 keys that a warp copies.
template <bool blocks>
class Gather {
 public:
  __device__ Gather(const Arguments& arguments, std::int64_t t, std::int32_t first,
                    std::int32_t step)
      : list_(arguments.columns.list + t * arguments.columns.width),
        column_(static_cast<std::uint32_t>(first) * kTile + threadIdx.x),
        last_entry_(static_cast<std::uint32_t>(arguments.columns.width) - 1),
        step_(static_cast<std::uint32_t>(step) * kTile),
        block_(static_cast<std::uint32_t>(arguments.columns.block)),
        stride_(static_cast<std::uint64_t>(arguments.problem.k.stride)) {
    const unsigned warp = threadIdx.x / 32 * 32;
    const unsigned row = warp + threadIdx.x % 32 / kChunks;
    place_ = row * kDim + (threadIdx.x % kChunks ^ row % 8) * 16;
    slot_ = warp + threadIdx.x % kAtOnce * kCopied + threadIdx.x % 32 / kAtOnce;
    if constexpr (blocks) {
      index_ = (column_ - threadIdx.x % 32) / block_;
      offset_ = (column_ - threadIdx.x % 32) % block_;
    }
    own_ = look_up();
  }

  // What the query sees, one key at least. Has to come before the first copy.
  __device__ void see(const Arguments& arguments, const Range& range) {
    keys_ = static_cast<const std::uint8_t*>(arguments.problem.k.data) +
            range.start * arguments.problem.k.stride + threadIdx.x % kChunks * 16;
    scales_ = arguments.scales + range.start;
    last_ = static_cast<std::uint32_t>(range.length) - 1;
    if constexpr (!blocks) {
#pragma unroll
      for (unsigned i = 0; i < kCopied; ++i) {
        positions_[i] = __shfl_sync(kFullMask, own_, i * kAtOnce + threadIdx.x % 32 / kChunks);
      }
    }
    // Opaque, so that an address is one multiply-add.
    asm("" : "+l"(keys_), "+l"(scales_), "+l"(list_));
  }

  // Starts the copies of a tile, and of what the list has for the one after it. For columns behind
  // the query's last one they copy some key that it sees, at which nobody looks.
  __device__ void copy(std::uint8_t* keys, float* scales, std::uint32_t* positions) {
    if constexpr (blocks) {
      const std::uint32_t base = own_ * block_ + offset_;
      own_ = base + threadIdx.x % 32;
#pragma unroll
      for (unsigned i = 0; i < kCopied; ++i) {
        positions_[i] = base + i * kAtOnce + threadIdx.x % 32 / kChunks;
      }
    }
    copy_4(scales + threadIdx.x, scales_ + min(own_, last_));
#pragma unroll
    for (unsigned i = 0; i < kCopied; ++i) {
      // Keys that are kAtOnce apart are swizzled by chunks that differ in one bit.
      const std::uint32_t place = (place_ ^ i % 2 * kAtOnce * 16) + i * kAtOnce * kDim;
      copy_16(keys + place, keys_ + std::uint64_t{min(positions_[i], last_)} * stride_);
    }
    column_ += step_;
    if constexpr (blocks) {
      index_ += step_ / block_;
      offset_ += step_ % block_;
      if (offset_ >= block_) {
        offset_ -= block_;
        ++index_;
      }
      own_ = look_up();
    } else {
      copy_4(positions + slot_, list_ + min(column_, last_entry_));
    }
  }

  // Reads what `copy` brought along, once the warp has it.
  __device__ void read(const std::uint32_t* positions) {
    if constexpr (!blocks) {
      const auto* own = reinterpret_cast<const uint4*>(positions + threadIdx.x / kChunks * kCopied);
      const uint4 low = own[0];
      const uint4 high = own[1];
      positions_[0] = low.x;
      positions_[1] = low.y;
      positions_[2] = low.z;
      positions_[3] = low.w;
      positions_[4] = high.x;
      positions_[5] = high.y;
      positions_[6] = high.z;
      positions_[7] = high.w;
      own_ = positions[slot_];
    }
  }

 private:
  __device__ std::uint32_t look_up() const {
    return static_cast<std::uint32_t>(__ldg(list_ + min(blocks ? index_ : column_, last_entry_)));
  }

  const std::int32_t* list_;
  const std::uint8_t* keys_ = nullptr;  // the thread's chunk of the first key that the query sees
  const float* scales_ = nullptr;       // of that key
  std::uint32_t last_ = 0;              // position that the query sees
  std::uint32_t column_;                // whose scale the thread copies next
  std::uint32_t last_entry_;            // of the list
  std::uint32_t step_;                  // columns
  std::uint32_t block_;
  std::uint64_t stride_;
  std::uint32_t place_;  // of the thread's chunk of its warp's first keys
  std::uint32_t slot_;   // of the thread's column among the positions
  std::uint32_t own_;    // position of that column; of a list of blocks, its entry
  std::uint32_t positions_[kCopied];
  std::uint32_t index_ = 0;   // where a list of blocks has the warp's first column,
  std::uint32_t offset_ = 0;  // and which position of that block it is
};
static_assert(2 * kAtOnce == 8, "a warp copies half of a swizzle's rows at once");
static_assert(kCopied == 8, "two vectors");

// Steps 2 to 4. `plain`: takes every scale for positive; says whether one of them was not.
template <bool residual, bool blocks, bool plain>
__device__ bool score_query(const Arguments& arguments, std::int64_t t, GatheredShared& shared) {
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
  gather.see(arguments, range);
  gather.copy(shared.keys[0], shared.scales[0], shared.positions[1]);
  commit_copies();
  __syncthreads();  // all see the query's weights
  float weights[kOwnRows];
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    weights[i] = shared.weights[i / 2 * 8 + lane % kQuad * 2 + i % 2];
  }
  // The residual row, in the quad's last place, is in no group.
  const float linear_weight = residual ? shared.weights[kMaxRows - 1] : 0.0F;
  if (residual && lane % kQuad == kQuad - 1) {
    weights[kOwnRows - 1] = 0;
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
    __syncthreads();  // all have the tile, and are done with the one before it

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
    const auto add_up = [&](const float(&sums)[kMaxRows / 2], int key) {
      const float scales[2] = {shared.scales[stage][key], shared.scales[stage][key + 8]};
      signs |= __float_as_int(scales[0]) | __float_as_int(scales[1]);
      float groups[2] = {0, 0};
      float linear[2];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float x = sums[i / 2 * 4 + 2 * r + i % 2];
          if (!plain) {
            x = copysignf(1.0F, scales[r]) * x;
          }
          groups[r] = __fmaf_rn(weights[i], max_nan(x, 0), groups[r]);
          linear[r] = x;  // the last one of them stays
        }
      }
      // Of a quad, lane 0 adds up the one key's groups and lane 1 the other's.
      const bool odd = lane % 2 != 0;
      const float own = odd ? groups[1] : groups[0];
      const float other = odd ? groups[0] : groups[1];
      const float neighbour = __shfl_xor_sync(kFullMask, other, 1);
      const float across = __shfl_xor_sync(kFullMask, own, 2);
      const float opposite = __shfl_xor_sync(kFullMask, other, 3);
      float total = __fadd_rn(own, neighbour);
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
    add_up(sums[0], row);
    __syncwarp();  // keeps the second wait from being moved up
    wgmma_wait<0>();
    wgmma_pin(sums[1]);
    add_up(sums[1], kProductKeys + row);
  }
  wait_for_copies<0>();
  return __syncthreads_or(static_cast<int>(plain && signs < 0)) != 0;
}

template <bool residual, bool blocks>
__global__ void __launch_bounds__(kGroupThreads, kGatheredBlocks)
    gathered_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  GatheredShared& shared = *reinterpret_cast<GatheredShared*>(memory);
  const std::int64_t t = blockIdx.x;
  load_query(arguments, t, shared);  // what the kernel just before this one does not write
  begin_kernel();
  if (score_query<residual, blocks, true>(arguments, t, shared)) {
    // A negative scale gives its sign, which is exact, to the products.
    score_query<residual, blocks, false>(arguments, t, shared);
  }
}

}  // namespace

void launch_gathered(const Problem& problem, const ActiveRows& rows, const Columns& columns,
                     const std::int32_t* lengths, std::int32_t unscored, const float* scales,
                     const Scores& scores, int num_sms, void* stream) {
  const std::int64_t queries = problem.q.tokens;
  const std::int64_t tiles = (scores.columns + kTile - 1) / kTile;
  const std::int64_t shares = std::clamp<std::int64_t>(
      std::int64_t{kGatheredBlocks} * num_sms / queries, 1, std::max<std::int64_t>(tiles, 1));
  const auto launch = [&]<bool residual, bool blocks>() {
    launch_kernel("listed scores", gathered_kernel<residual, blocks>,
                  dim3(static_cast<unsigned>(queries), static_cast<unsigned>(shares)),
                  kGroupThreads, sizeof(GatheredShared), stream,
                  Arguments{problem, rows, columns, lengths, unscored, scales, scores});
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
