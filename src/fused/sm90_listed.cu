// Scores of listed keys, a query a block; blocks share a query's tiles of 128 keys where there are
// few queries.
//
//  1. The query's rows become the B operand, heads 16 c … 16 c + 15 in the columns that lane c of a
//     quad holds, the residual row last of all.
//  2. A thread looks up one key of a tile, a tile before it is copied, and copies its scale. The
//     threads of a warp copy its 32 keys together, eight to a key, while the tile before is scored.
//  3. Two products of 64 keys and 64 rows leave 16 dot products of each of two keys in a thread.
//     The second is under way while the first is added up.
//  4. Each lane of a quad sums its 16, a group (scores.cuh); two of the lanes add up the groups of
//     a key each, and the residual row.
#include <cuda_runtime.h>

#include <algorithm>
#include <cuda/ptx>

#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "device/gather.cuh"
#include "device/wgmma.cuh"
#include "fused/listed.hpp"
#include "fused/scores.cuh"
#include "fused/sm90_config.cuh"

namespace misa::cuda::fused {
namespace {

namespace ptx = ::cuda::ptx;

constexpr int kProducts = 2;
constexpr int kTile = kProducts * kProductKeys;
constexpr int kQuad = 4;
constexpr int kOwnRows = kMaxRows / kQuad;
static_assert(kOwnRows == kGroupRows, "a lane has a group");
static_assert(kGroupThreads == 2 * kMaxRows, "two threads load a row");

// Threads that copy a key, and keys that a warp copies at once.
constexpr int kChunks = kDim / 16;
constexpr int kAtOnce = 32 / kChunks;
static_assert(kTile == kGroupThreads, "a thread looks up a key");

// Four blocks are what registers have room for: while one waits for its tile, others add.
constexpr int kListedStages = 2;
constexpr int kListedBlocks = 4;

struct ListedShared {
  alignas(1024) std::uint8_t keys[kListedStages][kTile * kDim];
  alignas(1024) std::uint8_t rows[kMaxRows * kDim];
  float scales[kListedStages][kTile];
  float weights[kMaxRows];
};
static_assert(kListedBlocks * (sizeof(ListedShared) + 1024) <= 227 * 1024);

struct Arguments {
  Problem problem;
  Rows rows;
  cuda::Columns columns;
  const std::int32_t* lengths;
  std::int32_t unscored;
  const float* scales;
  Scores scores;
};

// Step 1. Weights of rows that are clipped make up for kClip; a NaN comes with the weight.
__device__ void load_query(const Arguments& arguments, std::int64_t t, ListedShared& shared) {
  const auto& [q, w, k] = arguments.problem;
  const Rows& rows = arguments.rows;
  const int column = static_cast<int>(threadIdx.x) / 2;
  const int first_chunk = static_cast<int>(threadIdx.x) % 2 * (kChunks / 2);
  const int slot = column % 8 / 2 * kOwnRows + column / 8 * 2 + column % 2;
  const std::uint8_t* source = nullptr;
  float weight = 0;
  if (slot < rows.head_count) {
    const std::int32_t head = rows.heads == nullptr ? slot : rows.heads[t * rows.head_count + slot];
    if (head >= 0) {
      source = static_cast<const std::uint8_t*>(q.data) + t * q.token_stride + head * q.head_stride;
      weight = w.data[t * w.token_stride + head] / kClip;
    }
  } else if (rows.residual != nullptr && slot == kMaxRows - 1) {
    source = rows.residual + t * kDim;
    weight = rows.residual_scale[t];
  }
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kChunks / 2; ++i) {
    const int chunk = first_chunk + i;
    const uint4 bytes = source == nullptr ? make_uint4(0, 0, 0, 0)
                                          : __ldg(reinterpret_cast<const uint4*>(source) + chunk);
    *reinterpret_cast<uint4*>(shared.rows + column * kDim + (chunk ^ column % 8) * 16) = bytes;
    nan = nan || any_nan(bytes);
  }
  nan = __shfl_xor_sync(kWarp, static_cast<int>(nan), 1) != 0 || nan;
  if (first_chunk == 0) {
    shared.weights[column] = nan ? std::numeric_limits<float>::quiet_NaN() : weight;
  }
}

// clipped(x), or clipped(-x) if the factor is -kClip.
__device__ float clipped(float x, float factor) {
  float y;
  asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(factor));
  return y;
}

// Step 2 for a thread. `blocks`: the list is of blocks of positions, not of positions.
template <bool blocks>
class Gather {
 public:
  __device__ Gather(const Arguments& arguments, std::int64_t t, const Range& range,
                    std::int32_t length)
      : list_(arguments.columns.list + t * arguments.columns.width),
        keys_(static_cast<const std::uint8_t*>(arguments.problem.k.data) +
              range.start * arguments.problem.k.stride + threadIdx.x % kChunks * 16),
        scales_(arguments.scales + range.start),
        stride_(arguments.problem.k.stride),
        visible_(static_cast<std::uint32_t>(range.length)),
        length_(static_cast<std::uint32_t>(length)),
        block_(static_cast<std::uint32_t>(arguments.columns.block)) {
    const unsigned row = threadIdx.x / 32 * 32 + threadIdx.x % 32 / kChunks;
    place_ = row * kDim + (threadIdx.x % kChunks ^ row % 8) * 16;
  }

  // Looks up the thread's key of a tile. What comes is not touched before `copy`, so that no thread
  // waits for it.
  __device__ void find(std::int32_t tile) {
    column_ = static_cast<std::uint32_t>(tile) * kTile + threadIdx.x;
    entry_ = column_ < length_ ? __ldg(list_ + (blocks ? column_ / block_ : column_)) : -1;
  }

  // Starts the copies of what was looked up. An entry of -1 is a position that no query sees.
  __device__ void copy(std::uint8_t* keys, float* scales) const {
    auto position = static_cast<std::uint32_t>(entry_);
    if constexpr (blocks) {
      position = entry_ < 0 ? kNone : position * block_ + column_ % block_;
    }
    const bool seen = position < visible_;
    copy_4_or_zero(scales + threadIdx.x, scales_ + (seen ? position : 0), seen);
    position = seen ? position : kNone;
#pragma unroll
    for (unsigned i = 0; i < 32 / kAtOnce; ++i) {
      const std::uint32_t other =
          __shfl_sync(kWarp, position, i * kAtOnce + threadIdx.x % 32 / kChunks);
      const bool there = other != kNone;
      // Keys that are kAtOnce apart are swizzled by chunks that differ in one bit.
      const std::uint32_t place = (place_ ^ i % 2 * kAtOnce * 16) + i * kAtOnce * kDim;
      copy_16_or_zero(keys + place, keys_ + (there ? other : 0) * stride_, there);
    }
  }

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFFU;

  const std::int32_t* list_;
  const std::uint8_t* keys_;  // the thread's chunk of the first key that the query sees
  const float* scales_;       // of that key
  std::int64_t stride_;
  std::uint32_t visible_;  // keys
  std::uint32_t length_;   // columns
  std::uint32_t block_;
  std::uint32_t place_;  // of the thread's chunk of its warp's first keys
  std::uint32_t column_ = 0;
  std::int32_t entry_ = -1;
};
static_assert(2 * kAtOnce == 8, "a warp copies half of a swizzle's rows at once");

template <bool residual, bool blocks>
__global__ void __launch_bounds__(kGroupThreads, kListedBlocks)
    listed_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  extern __shared__ __align__(1024) std::uint8_t memory[];
  ListedShared& shared = *reinterpret_cast<ListedShared*>(memory);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t t = blockIdx.x;
  const Range range = visible(arguments.problem.k, t);
  const auto length =
      static_cast<std::int32_t>(min(std::int64_t{arguments.lengths[t]}, arguments.scores.columns));
  const std::int32_t tiles = (length + kTile - 1) / kTile;
  auto tile = static_cast<std::int32_t>(blockIdx.y);
  const auto step = static_cast<std::int32_t>(gridDim.y);
  if (range.length <= arguments.unscored || tile >= tiles) {
    return;
  }

  Gather<blocks> gather(arguments, t, range, length);
  std::int32_t ahead = tile;  // the next to be copied, already looked up
  const auto fetch = [&](int stage) {
    if (ahead < tiles) {
      gather.copy(shared.keys[stage], shared.scales[stage]);
      ahead += step;
      gather.find(ahead);
    }
    commit_copies();
  };
  gather.find(ahead);
  for (int stage = 0; stage < kListedStages - 1; ++stage) {
    fetch(stage);
  }
  load_query(arguments, t, shared);
  __syncthreads();
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
  const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / kQuad;

  for (int stage = 0; tile < tiles; tile += step, stage = (stage + 1) % kListedStages) {
    wait_for_copies<kListedStages - 2>();
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();  // all have the tile, and are done with the one before it

    float sums[kProducts][kMaxRows / 2];  // step 3
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      const std::uint64_t keys = swizzled_tile(shared.keys[stage] + product * kProductKeys * kDim);
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<kMaxRows>(sums[product], keys + 2 * k, rows + 2 * k, k > 0);
      }
      wgmma_commit();
    }
    fetch((stage + kListedStages - 1) % kListedStages);

    // Step 4. The sign of a scale, which is exact, goes to the products.
    const auto add_up = [&](const float(&sums)[kMaxRows / 2], int key) {
      const float scales[2] = {shared.scales[stage][key], shared.scales[stage][key + 8]};
      float groups[2] = {0, 0};
      float linear[2];
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float x = sums[i / 2 * 4 + 2 * r + i % 2];
          groups[r] = __fmaf_rn(weights[i], clipped(x, copysignf(kClip, scales[r])), groups[r]);
          linear[r] = copysignf(1.0F, scales[r]) * x;  // the last one of them stays
        }
      }
      // Of a quad, lane 0 adds up the one key's groups and lane 1 the other's.
      const bool odd = lane % 2 != 0;
      const float own = odd ? groups[1] : groups[0];
      const float other = odd ? groups[0] : groups[1];
      const float neighbour = __shfl_xor_sync(kWarp, other, 1);
      const float across = __shfl_xor_sync(kWarp, own, 2);
      const float opposite = __shfl_xor_sync(kWarp, other, 3);
      float total = __fadd_rn(own, neighbour);
      total = __fadd_rn(__fadd_rn(total, odd ? opposite : across), odd ? across : opposite);
      if constexpr (residual) {
        const float first = __shfl_sync(kWarp, linear[0], kQuad - 1, kQuad);
        const float second = __shfl_sync(kWarp, linear[1], kQuad - 1, kQuad);
        total = __fmaf_rn(linear_weight, odd ? second : first, total);
      }
      const std::int32_t column = tile * kTile + key + (odd ? 8 : 0);
      if (lane % kQuad < 2 && column < length) {
        arguments.scores.data[t * arguments.scores.columns + column] =
            __fmul_rn(total, fabsf(odd ? scales[1] : scales[0]));
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
}

}  // namespace

void launch_listed(const Problem& problem, const Rows& rows, const cuda::Columns& columns,
                   const std::int32_t* lengths, std::int32_t unscored, const float* scales,
                   const Scores& scores, int processors, void* stream) {
  const std::int64_t queries = problem.q.tokens;
  const std::int64_t tiles = (scores.columns + kTile - 1) / kTile;
  const std::int64_t shares = std::clamp<std::int64_t>(
      std::int64_t{kListedBlocks} * processors / queries, 1, std::max<std::int64_t>(tiles, 1));
  const auto launch = [&]<bool residual, bool blocks>() {
    launch_kernel("listed scores", listed_kernel<residual, blocks>,
                  dim3(static_cast<unsigned>(queries), static_cast<unsigned>(shares)),
                  kGroupThreads, sizeof(ListedShared), stream,
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

}  // namespace misa::cuda::fused
