// SPDX-License-Identifier: Apache-2.0
// Scores a chunk of queries against all keys that they see, and writes only scores above a query's
// gate threshold.
//
// A thread block scores the queries of a query block against some splits of the key tiles
// (KeySplits). Each of its four warpgroups has 128 query rows as the B operand (256 if a query has
// 64 rows): rows of active heads and residual rows, gathered while they are loaded.
//
//  0. Prefetch inputs that the previous kernel does not write, before waiting for it: the first key
//     tile and, for candidates, the query rows.
//  1. The producer, one thread, fetches the next key tile by TMA.
//  2. Each warpgroup multiplies 64 keys (M) with 128 of its query rows (N). While the tensor cores
//     compute its product, other warpgroups run their epilogues.
//  3. The columns of a product are ordered so that one thread accumulates all rows of a query
//     (QueryTile). So each thread clips, weights and adds up the scores of its own queries, in
//     order of the heads, without exchanging values with other threads.
//  4. A score above the gate threshold goes to the thread's queue in shared memory. This takes
//     neither votes nor atomics, which would delay the next product.
//  5. When queues fill up, entries move to the lists of candidates in global memory while a product
//     runs. There is a list for each query and thread block that scores it. Neighbouring tiles
//     belong to different splits, so a cluster of good keys fills all lists evenly.
//
// The same kernel scores the sampled keys, with another sink, which writes all scores.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cuda/ptx>
#include <limits>
#include <type_traits>
#include <utility>

#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.hpp"
#include "fused/sm90_fp8.hpp"
#include "fused/sm90_fp8_config.cuh"
#include "score/sm90_fp8_rows.cuh"

namespace misa::cuda::fused {
namespace {

namespace ptx = ::cuda::ptx;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Sink { samples, candidates };

template <Sink sink>
struct KeyTile {
  static constexpr int kKeys = sink == Sink::samples ? kSampleTileKeys : kTileKeys;
  static constexpr int kSlices = kKeys / kProductKeys;  // of 64 keys: M of a product
  static constexpr int kFetchSlice = kSlices * 3 / 4;  // the next tile is fetched before this slice
  static constexpr int kBytes = kKeys * kDim;
  static_assert(kKeys <= kTileKeys && kSlices % 2 == 0);
};

struct FusedArguments {
  Problem problem;
  score::ActiveRows rows;
  KeySplits splits;
  std::int64_t key_stride;  // key index of tile row r is r * key_stride
  std::int64_t key_rows;    // rows of the key tensor map
  const float* scales;      // of all keys, padded to whole tiles (score::launch_scales)
  const float* thresholds;  // [T]
  Candidates candidates;
  float* scores;  // [T, key_rows]
};

// The lists of a thread's queries: the g-th query's count is counts[4 g], and its entries start at
// first + g * stride.
struct CandidateLists {
  std::uint32_t* counts;
  std::uint32_t first;
  std::uint32_t stride;
};

// A thread's queue in shared memory: the address of its first entry, and that after its last entry.
struct Queue {
  std::uint32_t first;
  std::uint32_t tail;

  __device__ explicit Queue(const Candidate* entries)
      : first(shared_address(entries)), tail(first) {}
  __device__ bool empty() const { return tail == first; }
  __device__ bool holds_more_than(int count) const { return tail > first + count * kQueueStride; }
  __device__ void push(float score, std::uint32_t key) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(tail), "r"(__float_as_uint(score)),
                 "r"(key));
    tail += kQueueStride;
  }
  // Step 5: moves the queue's last entry, if there is one, to its list.
  __device__ void pop(const Candidates& out, const CandidateLists& lists) {
    if (empty()) {
      return;
    }
    tail -= kQueueStride;
    std::uint32_t score;
    std::uint32_t key;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(score), "=r"(key) : "r"(tail));
    const std::uint32_t g = key >> kKeyBits;
    const std::uint32_t slot = atomicAdd(lists.counts + g * 4, 1U);
    if (slot < out.capacity) {
      out.entries[lists.first + g * lists.stride + slot] = {__uint_as_float(score),
                                                            key & ((1U << kKeyBits) - 1)};
    }
  }
};

// The splits of one query block that a thread block scores.
struct WorkItem {
  std::int64_t first_query;
  int first_split;
  int splits;    // how many
  int list;      // which of the queries' lists the thread block fills
  bool is_last;  // whether the query block's last split is among them
};

// Iterates over the tiles of a work item in ascending order. Modulo the number of splits, the
// tiles' numbers are an arithmetic sequence that wraps around: every step is one stride, except the
// step from the item's last split to its first.
struct TileIterator {
  std::int32_t tile;
  int split;  // number in the work item

  // Starts at the item's first tile that is not before first_tile.
  __device__ TileIterator(const KeySplits& splits, const WorkItem& item, std::int32_t first_tile) {
    const int offset = item.first_split * splits.stride % splits.splits;
    const int before_wrap = (splits.splits - 1 - offset) / splits.stride + 1;
    split = before_wrap < item.splits ? before_wrap : 0;
    tile = first_tile + offset + split * splits.stride - (split != 0 ? splits.splits : 0);
  }
  __device__ void advance(const KeySplits& splits, int item_splits) {
    const bool last = split == item_splits - 1;
    tile += last ? splits.splits - split * splits.stride : splits.stride;
    split = last ? 0 : split + 1;
  }
};

// Calls body(std::integral_constant) for every index.
template <int... index, class Body>
__device__ void unroll(std::integer_sequence<int, index...>, const Body& body) {
  (body(std::integral_constant<int, index>{}), ...);
}

// Steps 0 to 5 of one warpgroup for the tiles of a work item. `iteration` counts the tiles that the
// thread block has scored.
template <int rows, bool residual, Sink sink>
__device__ void score_tiles(const CUtensorMap& map, const FusedArguments& arguments,
                            Shared<rows>& shared, int warpgroup, const WorkItem& item,
                            TileIterator tiles, std::int32_t end_tile, std::uint32_t& iteration) {
  using Tile = KeyTile<sink>;
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int lane = thread % 32;
  const std::int64_t tokens = arguments.problem.q.tokens;
  const std::int64_t first = item.first_query + warpgroup * QueryTile<rows>::kQueries;

  // Step 1: fetches the tile of an iteration of the pipeline, once its stage is empty.
  const auto fetch = [&](std::uint32_t iteration, std::int32_t tile) {
    if (tile >= end_tile) {
      return;
    }
    const std::uint32_t stage = iteration % kStages;
    if (iteration >= kStages) {
      while (!ptx::mbarrier_try_wait_parity(&shared.empty[stage], (iteration / kStages - 1) % 2)) {
      }
    }
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                                   &shared.full[stage], Tile::kBytes);
    const std::int32_t corner[2] = {0, tile * Tile::kKeys};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared.keys[stage], &map,
                              corner, &shared.full[stage]);
  };
  const bool is_producer = threadIdx.x == 0;
  if (is_producer) {
    fetch(iteration, tiles.tile);
  }
  if constexpr (sink == Sink::samples) {
    begin_kernel();  // nothing that routing or launch_scales writes has been read yet
  }
  score::load_rows<rows, residual, QueryTile<rows>::kColumns>(
      arguments.problem, arguments.rows, thread, kWarpgroupThreads,
      [&](int query) { return first + query < tokens ? first + query : std::int64_t{-1}; },
      shared.query_rows[warpgroup], shared.weights[warpgroup]);
  float thresholds[QueryTile<rows>::kThreadQueries];
  if constexpr (sink == Sink::candidates) {
    begin_kernel();  // nothing that the threshold kernel writes has been read yet
#pragma unroll
    for (int g = 0; g < QueryTile<rows>::kThreadQueries; ++g) {
      const std::int64_t t = first + 4 * g + lane % 4;
      thresholds[g] = t < tokens ? arguments.thresholds[t] : std::numeric_limits<float>::infinity();
    }
  }
  ptx::fence_proxy_async(ptx::space_shared);
  barrier_sync(1 + warpgroup, kWarpgroupThreads);

  const std::uint64_t row_tile = swizzled_tile(shared.query_rows[warpgroup]);
  const std::uint64_t key_tiles = swizzled_tile(shared.keys);
  const score::SharedWeights weights(shared.weights[warpgroup][0], lane);
  // The weights of the thread's columns are in registers if one product has all columns and there
  // are many products, else in shared memory.
  constexpr bool kWeightsInRegisters = sink == Sink::candidates && QueryTile<rows>::kProducts == 1;
  [[maybe_unused]] float register_weights[kThreadColumns];
  if constexpr (kWeightsInRegisters) {
#pragma unroll
    for (int i = 0; i < kThreadColumns; ++i) {
      register_weights[i] = weights.lane_weights[i];
    }
  }
  Queue queue(&shared.queue[0][warpgroup * kWarpgroupThreads + thread]);
  const std::uint32_t list_stride = arguments.candidates.lists * arguments.candidates.capacity;
  const CandidateLists lists{shared.counts + warpgroup * QueryTile<rows>::kQueries + lane % 4,
                             static_cast<std::uint32_t>(first + lane % 4) * list_stride +
                                 item.list * arguments.candidates.capacity,
                             4 * list_stride};

  // The thread's keys of each slice are thread_row and thread_row + 8. Their scales are loaded two
  // slices ahead.
  const std::int32_t thread_row = thread / 32 * 16 + lane / 4;
  float scales[4];
  const auto load_scales = [&](std::int32_t row, int slice) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int offset = slice * kProductKeys + j * 8;
      const int i = 2 * (slice % 2) + j;
      if constexpr (sink == Sink::candidates) {
        scales[i] = __ldg(arguments.scales + row + offset);
      } else {  // the scales of samples are not padded to whole tiles
        const std::int64_t sample = row + offset;
        scales[i] =
            __ldg(arguments.scales + min(sample, arguments.key_rows - 1) * arguments.key_stride);
      }
    }
  };
  if (tiles.tile < end_tile) {
    load_scales(tiles.tile * Tile::kKeys + thread_row, 0);
    load_scales(tiles.tile * Tile::kKeys + thread_row, 1);
  }
  for (; tiles.tile < end_tile; ++iteration) {
    const std::uint32_t stage = iteration % kStages;
    const std::int32_t tile = tiles.tile;
    tiles.advance(arguments.splits, item.splits);
    const std::int32_t row = tile * Tile::kKeys + thread_row;
    const std::int32_t next_row = min(tiles.tile, end_tile - 1) * Tile::kKeys + thread_row;
    // The sign bit is set if some query does not see the whole tile.
    const std::uint32_t masked =
        tile >= shared.fully_visible[warpgroup].first && tile < shared.fully_visible[warpgroup].end
            ? 0
            : 0x80000000U;
    while (!ptx::mbarrier_try_wait_parity(&shared.full[stage], iteration / kStages % 2)) {
    }
    const std::uint64_t tile_keys = key_tiles + stage * (sizeof(shared.keys[0]) / 16);
    float partial[2];
    bool unmasked_nonnegative = false;  // whether all keys are visible and no scale is negative
    const auto score_product = [&]<int index>(std::integral_constant<int, index>) {
      constexpr int kSlice = index / QueryTile<rows>::kProducts;    // of the tile's keys
      constexpr int kProduct = index % QueryTile<rows>::kProducts;  // of the slice
      constexpr bool kLastProduct = index == Tile::kSlices * QueryTile<rows>::kProducts - 1;
      if constexpr (index == Tile::kFetchSlice * QueryTile<rows>::kProducts) {
        if (is_producer) {
          fetch(iteration + 1, tiles.tile);
        }
      }
      const float* slice_scales = scales + 2 * (kSlice % 2);
      float sums[2 * kThreadColumns];
      const std::uint64_t keys = tile_keys + kSlice * kProductKeys * kDim / 16;
      const std::uint64_t columns = row_tile + kProduct * kProductColumns * kDim / 16;
      wgmma_fence();  // step 2
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<kProductColumns>(sums, keys + 2 * k, columns + 2 * k, k > 0);
      }
      wgmma_commit();
      // While the product runs: step 5, and whether the fast epilogue is possible.
      if constexpr (kProduct == 0) {
        if constexpr (sink == Sink::candidates) {
          while (__any_sync(kFullMask, queue.holds_more_than(queue_spare(rows)))) {
            queue.pop(arguments.candidates, lists);
          }
        }
        const std::uint32_t signs =
            __float_as_uint(slice_scales[0]) | __float_as_uint(slice_scales[1]);
        unmasked_nonnegative =
            !__any_sync(kFullMask, static_cast<std::int32_t>(masked | signs) < 0);
      }
      wgmma_wait<0>();
      wgmma_pin(sums);
      if constexpr (kLastProduct) {
        if (thread == 0) {
          ptx::mbarrier_arrive(&shared.empty[stage]);
        }
      }
      // Step 4, or the write of a sampled key's score.
      const auto write = [&](int g, int r, float score) {
        const std::int32_t key = row + kSlice * kProductKeys + 8 * r;
        if constexpr (sink == Sink::samples) {
          const std::int64_t t = first + 4 * g + lane % 4;
          if (t < tokens && key < arguments.key_rows) {
            arguments.scores[t * arguments.key_rows + key] = score;
          }
        } else {
          if (score > thresholds[g]) {
            queue.push(score, static_cast<std::uint32_t>(key) +
                                  (static_cast<std::uint32_t>(g) << kKeyBits));
          }
        }
      };
      const auto write_masked = [&](int g, int r, float score) {
        const std::int64_t key = (row + kSlice * kProductKeys + 8 * r) * arguments.key_stride;
        const int query = warpgroup * QueryTile<rows>::kQueries + 4 * g + lane % 4;
        const bool visible = key >= shared.starts[query] && key < shared.ends[query];
        write(g, r, visible ? score : kNaN);
      };
      const auto weights_of = [&](int column) {
        if constexpr (kWeightsInRegisters) {
          return make_float4(register_weights[column], register_weights[column + 1],
                             register_weights[column + 2], register_weights[column + 3]);
        } else {
          return weights(kProduct * kProductWeights + column);
        }
      };
      constexpr int kFirstColumn = kProduct * kThreadColumns;
      if (unmasked_nonnegative) {  // step 3
        score::weighted_relu_sum<rows, residual, kFirstColumn, true, kThreadColumns>(
            sums, weights_of, slice_scales, partial, write);
      } else {
        score::weighted_relu_sum<rows, residual, kFirstColumn, false, kThreadColumns>(
            sums, weights_of, slice_scales, partial, write_masked);
      }
      if constexpr (kProduct == QueryTile<rows>::kProducts - 1) {
        if constexpr (kSlice + 2 < Tile::kSlices) {
          load_scales(row, kSlice + 2);
        } else {
          load_scales(next_row, kSlice + 2 - Tile::kSlices);
        }
      }
    };
    unroll(std::make_integer_sequence<int, Tile::kSlices * QueryTile<rows>::kProducts>{},
           score_product);
  }
  if constexpr (sink == Sink::candidates) {
    while (__any_sync(kFullMask, !queue.empty())) {
      queue.pop(arguments.candidates, lists);
    }
    barrier_sync(1 + warpgroup, kWarpgroupThreads);
    for (int query = thread; query < QueryTile<rows>::kQueries && first + query < tokens;
         query += kWarpgroupThreads) {
      std::uint32_t* counts =
          arguments.candidates.counts + (first + query) * arguments.candidates.lists;
      counts[item.list] = shared.counts[warpgroup * QueryTile<rows>::kQueries + query];
      for (std::uint32_t i = item.list + 1; item.is_last && i < arguments.candidates.lists; ++i) {
        counts[i] = 0;
      }
    }
  }
}

// Finds the keys and tiles that the queries of a work item see, then scores the tiles.
template <int rows, bool residual, Sink sink>
__device__ void score_item(const CUtensorMap& map, const FusedArguments& arguments,
                           Shared<rows>& shared, const WorkItem& item, std::uint32_t& iteration) {
  using Tile = KeyTile<sink>;
  if (threadIdx.x == 0) {
    shared.first_key = std::numeric_limits<std::int32_t>::max();
    shared.end_key = 0;
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
      shared.fully_visible[warpgroup].first = 0;
      shared.fully_visible[warpgroup].end = std::numeric_limits<std::int32_t>::max();
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < QueryTile<rows>::kBlockQueries; i += kThreads) {
    const std::int64_t t = item.first_query + i;
    Range range{0, 0};
    if (t < arguments.problem.q.tokens) {
      range = visible(arguments.problem.k, t);
      const int warpgroup = i / QueryTile<rows>::kQueries;
      const auto step = static_cast<std::int32_t>(arguments.key_stride * Tile::kKeys);
      atomicMax(&shared.fully_visible[warpgroup].first, (range.start + step - 1) / step);
      atomicMin(&shared.fully_visible[warpgroup].end, (range.start + range.length) / step);
      if (range.length > 0) {
        atomicMin(&shared.first_key, range.start);
        atomicMax(&shared.end_key, range.start + range.length);
      }
    }
    shared.counts[i] = 0;
    shared.starts[i] = range.start;
    shared.ends[i] = range.start + range.length;
  }
  __syncthreads();

  std::int32_t first_tile = 0;
  std::int32_t end_tile =
      static_cast<std::int32_t>((arguments.key_rows + Tile::kKeys - 1) / Tile::kKeys);
  if constexpr (sink == Sink::candidates) {
    first_tile = shared.first_key / Tile::kKeys;
    end_tile = min(end_tile, (shared.end_key + Tile::kKeys - 1) / Tile::kKeys);
  }
  if (shared.end_key == 0) {  // no query of the query block sees a key
    end_tile = 0;
  }

  // The shuffle tells the compiler that the index is the same in all lanes of a warp.
  const int warpgroup =
      __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  score_tiles<rows, residual, sink>(map, arguments, shared, warpgroup, item,
                                    {arguments.splits, item, first_tile}, end_tile, iteration);
}

template <int rows, bool residual, Sink sink>
__global__ void __launch_bounds__(kThreads, 1)
    score_kernel(const __grid_constant__ CUtensorMap map,
                 const __grid_constant__ FusedArguments arguments) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<rows>*>(memory);
  constexpr int kQueries = QueryTile<rows>::kBlockQueries;
  const KeySplits& splits = arguments.splits;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], kWarpgroups);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  // Unsigned division takes fewer registers.
  const auto query_blocks =
      static_cast<unsigned>((arguments.problem.q.tokens + kQueries - 1) / kQueries);
  const unsigned splits_each = splits.splits;
  const unsigned per_block = splits.per_block;
  std::uint32_t iteration = 0;
  unsigned split = blockIdx.x * per_block;  // index among the splits of all query blocks
  const unsigned end_split = min(split + per_block, query_blocks * splits_each);
  while (split < end_split) {
    const unsigned query_block = split / splits_each;
    const unsigned first_split = split % splits_each;
    const unsigned item_splits = min(end_split - split, splits_each - first_split);
    const unsigned list = blockIdx.x - query_block * splits_each / per_block;
    score_item<rows, residual, sink>(
        map, arguments, shared,
        {std::int64_t{query_block} * kQueries, static_cast<int>(first_split),
         static_cast<int>(item_splits), static_cast<int>(list),
         first_split + item_splits == splits_each},
        iteration);
    if constexpr (sink == Sink::samples || !may_span_query_blocks(rows)) {
      return;
    }
    split += item_splits;
    __syncthreads();
  }
}

template <Sink sink>
void launch(const FusedArguments& arguments, void* stream) {
  const DeviceRaggedSource& k = arguments.problem.k;
  // Without keys there are no tiles, and nothing reads the map.
  const CUtensorMap map =
      arguments.key_rows > 0
          ? tensor_map<2>(k.data, {kDim, static_cast<cuuint64_t>(arguments.key_rows)},
                          {static_cast<cuuint64_t>(k.stride * arguments.key_stride)},
                          {kDim, KeyTile<sink>::kKeys})
          : CUtensorMap{};
  score::for_rows(arguments.rows, [&]<int rows, bool residual>() {
    const auto kernel = score_kernel<rows, residual, sink>;
    const std::int64_t query_blocks =
        (arguments.problem.q.tokens + QueryTile<rows>::kBlockQueries - 1) /
        QueryTile<rows>::kBlockQueries;
    const KeySplits& splits = arguments.splits;
    launch_kernel("fused scores", kernel,
                  dim3(static_cast<unsigned>((query_blocks * splits.splits + splits.per_block - 1) /
                                             splits.per_block)),
                  kThreads, sizeof(Shared<rows>), stream, map, arguments);
  });
}

}  // namespace

void launch_samples(const Problem& problem, const score::ActiveRows& rows, const WorkPlan& plan,
                    const float* scales, float* scores, void* stream) {
  launch<Sink::samples>({problem,
                         rows,
                         plan.sample_splits,
                         plan.sample_stride,
                         plan.samples,
                         scales,
                         nullptr,
                         {},
                         scores},
                        stream);
}

void launch_candidates(const Problem& problem, const score::ActiveRows& rows, const WorkPlan& plan,
                       const float* scales, const float* thresholds, const Candidates& out,
                       void* stream) {
  launch<Sink::candidates>(
      {problem, rows, plan.key_splits, 1, problem.k.tokens, scales, thresholds, out, nullptr},
      stream);
}

}  // namespace misa::cuda::fused
