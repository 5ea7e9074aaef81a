// SPDX-License-Identifier: Apache-2.0
// Scores of a slab of queries against all keys that they see, gated on the spot: no score is
// written unless it is above its query's threshold.
//
// A block takes 4 x 128 rows of queries (routed heads and residual rows, gathered as they are
// loaded; 4 x 256 where a query has 64) and a share of the tiles of keys (Deal).
//
//  0. What the kernel before this one does not write is on its way before that one ends: tiles of
//     keys, and for candidates also the rows of queries.
//  1. A thread has the copy engine bring the next tile of keys.
//  2. A warpgroup multiplies 64 keys with 128 of its own rows: keys on M, rows on N. The tensor
//     cores work for one group while the others weighted_relu_sum.
//  3. The rows of a query stand in columns that one thread holds (ProductColumns), so each thread
//  clips,
//     weighs and sums the scores of its own queries in order of the heads, and no thread needs
//     another's.
//  4. A score above its query's threshold goes to the thread's own queue in shared memory: no
//  votes, no
//     atomics on the way of the tensor cores.
//  5. When queues fill up, entries go on into the lists of candidates in global memory, one a query
//     and thread block, while a product is under way. Neighbouring tiles go to different blocks, so
//     that a cluster of good keys fills all lists alike.
//
// Scores of sampled keys are the same kernel with another sink: all of them are written.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cuda/ptx>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/range.cuh"
#include "fused/sm90_fp8.hpp"
#include "fused/sm90_fp8_config.cuh"
#include "misa/error.hpp"
#include "score/sm90_fp8_rows.cuh"

namespace misa::cuda::fused {
namespace {

namespace ptx = ::cuda::ptx;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Sink { samples, candidates };

// A tile of a sink: its keys, as products of 64 of them, and before which of those the next tile
// is fetched.
template <Sink sink>
struct TileOf {
  static constexpr int kKeys = sink == Sink::samples ? kSampleTileKeys : kTileKeys;
  static constexpr int kParts = kKeys / kProductKeys;
  static constexpr int kFetchPart = kParts * 3 / 4;
  static constexpr int kBytes = kKeys * kDim;
  static_assert(kKeys <= kTileKeys && kParts % 2 == 0);
};

struct Arguments {
  Problem problem;
  score::ActiveRows rows;
  Deal deal;
  std::int64_t key_stride;  // key index of tile row r is r * key_stride
  std::int64_t key_rows;    // rows of the key tensor map
  const float* scales;      // of all keys, a multiple of kTileKeys (score::launch_scales)
  const float* thresholds;  // [T]
  Candidates candidates;
  float* scores;  // [T, key_rows]
};

// Where a thread's candidates go: of its query g, counts [4 g] and entries [base + g step].
struct Lists {
  std::uint32_t* counts;
  std::uint32_t base;
  std::uint32_t step;
};

// A thread's queue in shared memory, from its first entry to behind its last one: addresses.
struct Queue {
  std::uint32_t first;
  std::uint32_t tail;

  __device__ explicit Queue(const Candidate* entries)
      : first(shared_address(entries)), tail(first) {}
  __device__ bool empty() const { return tail == first; }
  __device__ bool holds_more_than(int count) const { return tail > first + count * kQueueStep; }
  __device__ void push(float score, std::uint32_t key) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(tail), "r"(__float_as_uint(score)),
                 "r"(key));
    tail += kQueueStep;
  }
  // Step 5 for the last entry.
  __device__ void pop(const Candidates& out, const Lists& lists) {
    if (empty()) {
      return;
    }
    tail -= kQueueStep;
    std::uint32_t score;
    std::uint32_t key;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(score), "=r"(key) : "r"(tail));
    const std::uint32_t g = key >> kKeyBits;
    const std::uint32_t slot = atomicAdd(lists.counts + g * 4, 1U);
    if (slot < out.capacity) {
      out.entries[lists.base + g * lists.step + slot] = {__uint_as_float(score),
                                                         key & ((1U << kKeyBits) - 1)};
    }
  }
};

// What a thread block has of a block of queries.
struct Piece {
  std::int64_t first_query;
  int first_part;
  int parts;   // how many
  int list;    // which of the queries' lists is the thread block's
  bool final;  // whether no other thread block has parts behind these
};

// The tiles of a piece, in order. Their numbers modulo deal.parts are an arithmetic sequence that
// comes round: all steps are alike but for the one from the piece's last part to its first.
struct Tiles {
  std::int32_t tile;
  int part;  // of the piece's

  // From the tile `first` on.
  __device__ Tiles(const Deal& deal, const Piece& piece, std::int32_t first) {
    const int offset = piece.first_part * deal.step % deal.parts;
    const int rest = (deal.parts - 1 - offset) / deal.step + 1;  // parts before it comes round
    part = rest < piece.parts ? rest : 0;
    tile = first + offset + part * deal.step - (part != 0 ? deal.parts : 0);
  }
  __device__ void advance(const Deal& deal, int parts) {
    const bool last = part == parts - 1;
    tile += last ? deal.parts - part * deal.step : deal.step;
    part = last ? 0 : part + 1;
  }
};

template <int... part, class Take>
__device__ void take_each(std::integer_sequence<int, part...>, const Take& take) {
  (take(std::integral_constant<int, part>{}), ...);
}

template <int rows, bool residual, Sink sink>
__device__ void score_group(const CUtensorMap& map, const Arguments& arguments,
                            Shared<rows>& shared, int group, const Piece& piece, Tiles tiles,
                            std::int32_t last_tile, std::uint32_t& pass) {
  using Own = ProductColumns<rows>;
  using Tile = TileOf<sink>;
  const int thread = threadIdx.x % kGroupThreads;
  const int lane = thread % 32;
  const std::int64_t tokens = arguments.problem.q.tokens;
  const std::int64_t first = piece.first_query + group * Own::kQueries;

  // Step 1: the tile of pass `pass`, once all groups are done with what stands in its stage.
  const auto fetch = [&](std::uint32_t pass, std::int32_t tile) {
    if (tile >= last_tile) {
      return;
    }
    const std::uint32_t stage = pass % kStages;
    if (pass >= kStages) {
      while (!ptx::mbarrier_try_wait_parity(&shared.empty[stage], (pass / kStages - 1) % 2)) {
      }
    }
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                                   &shared.full[stage], Tile::kBytes);
    const std::int32_t corner[2] = {0, tile * Tile::kKeys};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, shared.keys[stage], &map,
                              corner, &shared.full[stage]);
  };
  const bool feeds = threadIdx.x == 0;
  if (feeds) {
    fetch(pass, tiles.tile);
  }
  if constexpr (sink == Sink::samples) {
    begin_kernel();  // so far nothing was read that routing or launch_scales write
  }
  score::load_rows<rows, residual, Own::kCount>(
      arguments.problem, arguments.rows, thread, kGroupThreads,
      [&](int query) { return first + query < tokens ? first + query : std::int64_t{-1}; },
      shared.rows_of[group], shared.weights[group]);
  float thresholds[Own::kOwn];
  if constexpr (sink == Sink::candidates) {
    begin_kernel();  // so far nothing was read that the thresholds' kernel writes
#pragma unroll
    for (int g = 0; g < Own::kOwn; ++g) {
      const std::int64_t t = first + 4 * g + lane % 4;
      thresholds[g] = t < tokens ? arguments.thresholds[t] : std::numeric_limits<float>::infinity();
    }
  }
  ptx::fence_proxy_async(ptx::space_shared);
  barrier_sync(1 + group, kGroupThreads);

  const std::uint64_t row_tile = swizzled_tile(shared.rows_of[group]);
  const std::uint64_t key_tiles = swizzled_tile(shared.keys);
  const score::SharedWeights weights(shared.weights[group][0], lane);
  // The weights of a thread's columns: in registers, where they are those of one product and there
  // are many products.
  constexpr bool kOwnWeights = sink == Sink::candidates && Own::kProducts == 1;
  [[maybe_unused]] float own_weights[kProductLocals];
  if constexpr (kOwnWeights) {
#pragma unroll
    for (int i = 0; i < kProductLocals; ++i) {
      own_weights[i] = weights.own[i];
    }
  }
  Queue queue(&shared.queue[0][group * kGroupThreads + thread]);
  const std::uint32_t list_step = arguments.candidates.lists * arguments.candidates.capacity;
  const Lists lists{shared.counts + group * Own::kQueries + lane % 4,
                    static_cast<std::uint32_t>(first + lane % 4) * list_step +
                        piece.list * arguments.candidates.capacity,
                    4 * list_step};

  // Of each 64 keys of a tile the thread's are own_row and own_row + 8; their scales are loaded two
  // products ahead.
  const std::int32_t own_row = thread / 32 * 16 + lane / 4;
  float scales[4];
  const auto load_scales = [&](std::int32_t row, int part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int offset = part * kProductKeys + j * 8;
      const int i = 2 * (part % 2) + j;
      if constexpr (sink == Sink::candidates) {
        scales[i] = __ldg(arguments.scales + row + offset);
      } else {  // behind the last sample there is none
        const std::int64_t sample = row + offset;
        scales[i] =
            __ldg(arguments.scales + min(sample, arguments.key_rows - 1) * arguments.key_stride);
      }
    }
  };
  if (tiles.tile < last_tile) {
    load_scales(tiles.tile * Tile::kKeys + own_row, 0);
    load_scales(tiles.tile * Tile::kKeys + own_row, 1);
  }
  for (; tiles.tile < last_tile; ++pass) {
    const std::uint32_t stage = pass % kStages;
    const std::int32_t tile = tiles.tile;
    tiles.advance(arguments.deal, piece.parts);
    const std::int32_t row = tile * Tile::kKeys + own_row;
    const std::int32_t next = min(tiles.tile, last_tile - 1) * Tile::kKeys + own_row;
    // Its sign bit is set where some query does not see all of the tile.
    const std::uint32_t masked =
        tile >= shared.plain[group].first && tile < shared.plain[group].last ? 0 : 0x80000000U;
    while (!ptx::mbarrier_try_wait_parity(&shared.full[stage], pass / kStages % 2)) {
    }
    const std::uint64_t tile_keys = key_tiles + stage * (sizeof(shared.keys[0]) / 16);
    float partial[2];
    bool plain = false;
    const auto take = [&]<int part>(std::integral_constant<int, part>) {
      constexpr int kKeys = part / Own::kProducts;     // which 64 of the tile's
      constexpr int kProduct = part % Own::kProducts;  // which of the columns
      constexpr bool kLast = part == Tile::kParts * Own::kProducts - 1;
      if constexpr (part == Tile::kFetchPart * Own::kProducts) {
        if (feeds) {
          fetch(pass + 1, tiles.tile);
        }
      }
      const float* own_scales = scales + 2 * (kKeys % 2);
      float sums[2 * kProductLocals];
      const std::uint64_t keys = tile_keys + kKeys * kProductKeys * kDim / 16;
      const std::uint64_t columns = row_tile + kProduct * kProductColumns * kDim / 16;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<kProductColumns>(sums, keys + 2 * k, columns + 2 * k, k > 0);
      }
      wgmma_commit();
      // While the tensor cores work:
      if constexpr (kProduct == 0) {
        if constexpr (sink == Sink::candidates) {
          while (__any_sync(kFullMask, queue.holds_more_than(queue_spare(rows)))) {
            queue.pop(arguments.candidates, lists);
          }
        }
        const std::uint32_t signs = __float_as_uint(own_scales[0]) | __float_as_uint(own_scales[1]);
        plain = !__any_sync(kFullMask, static_cast<std::int32_t>(masked | signs) < 0);
      }
      wgmma_wait<0>();
      wgmma_pin(sums);
      if constexpr (kLast) {
        if (thread == 0) {
          ptx::mbarrier_arrive(&shared.empty[stage]);
        }
      }
      const auto emit = [&](int g, int r, float score) {
        const std::int32_t key = row + kKeys * kProductKeys + 8 * r;
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
      const auto emit_seen = [&](int g, int r, float score) {
        const std::int64_t key = (row + kKeys * kProductKeys + 8 * r) * arguments.key_stride;
        const int place = group * Own::kQueries + 4 * g + lane % 4;
        const bool seen = key >= shared.starts[place] && key < shared.ends[place];
        emit(g, r, seen ? score : kNaN);
      };
      const auto weights_from = [&](int local) {
        if constexpr (kOwnWeights) {
          return make_float4(own_weights[local], own_weights[local + 1], own_weights[local + 2],
                             own_weights[local + 3]);
        } else {
          return weights(kProduct * kProductWeights + local);
        }
      };
      constexpr int kFirst = kProduct * kProductLocals;
      if (plain) {
        score::weighted_relu_sum<rows, residual, kFirst, true, kProductLocals>(
            sums, weights_from, own_scales, partial, emit);
      } else {
        score::weighted_relu_sum<rows, residual, kFirst, false, kProductLocals>(
            sums, weights_from, own_scales, partial, emit_seen);
      }
      if constexpr (kProduct == Own::kProducts - 1) {
        if constexpr (kKeys + 2 < Tile::kParts) {
          load_scales(row, kKeys + 2);
        } else {
          load_scales(next, kKeys + 2 - Tile::kParts);
        }
      }
    };
    take_each(std::make_integer_sequence<int, Tile::kParts * Own::kProducts>{}, take);
  }
  if constexpr (sink == Sink::candidates) {
    while (__any_sync(kFullMask, !queue.empty())) {
      queue.pop(arguments.candidates, lists);
    }
    barrier_sync(1 + group, kGroupThreads);
    for (int query = thread; query < Own::kQueries && first + query < tokens;
         query += kGroupThreads) {
      std::uint32_t* counts =
          arguments.candidates.counts + (first + query) * arguments.candidates.lists;
      counts[piece.list] = shared.counts[group * Own::kQueries + query];
      for (std::uint32_t i = piece.list + 1; piece.final && i < arguments.candidates.lists; ++i) {
        counts[i] = 0;
      }
    }
  }
}

template <int rows, bool residual, Sink sink>
__device__ void score_piece(const CUtensorMap& map, const Arguments& arguments,
                            Shared<rows>& shared, const Piece& piece, std::uint32_t& pass) {
  using Own = ProductColumns<rows>;
  using Tile = TileOf<sink>;
  if (threadIdx.x == 0) {
    shared.first = std::numeric_limits<std::int32_t>::max();
    shared.last = 0;
    for (int group = 0; group < kGroups; ++group) {
      shared.plain[group].first = 0;
      shared.plain[group].last = std::numeric_limits<std::int32_t>::max();
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Own::kBlockQueries; i += kThreads) {
    const std::int64_t t = piece.first_query + i;
    Range range{0, 0};
    if (t < arguments.problem.q.tokens) {
      range = visible(arguments.problem.k, t);
      const int group = i / Own::kQueries;
      const auto step = static_cast<std::int32_t>(arguments.key_stride * Tile::kKeys);
      atomicMax(&shared.plain[group].first, (range.start + step - 1) / step);
      atomicMin(&shared.plain[group].last, (range.start + range.length) / step);
      if (range.length > 0) {
        atomicMin(&shared.first, range.start);
        atomicMax(&shared.last, range.start + range.length);
      }
    }
    shared.counts[i] = 0;
    shared.starts[i] = range.start;
    shared.ends[i] = range.start + range.length;
  }
  __syncthreads();

  std::int32_t first_tile = 0;
  std::int32_t last_tile =
      static_cast<std::int32_t>((arguments.key_rows + Tile::kKeys - 1) / Tile::kKeys);
  if constexpr (sink == Sink::candidates) {
    first_tile = shared.first / Tile::kKeys;
    last_tile = min(last_tile, (shared.last + Tile::kKeys - 1) / Tile::kKeys);
  }
  if (shared.last == 0) {  // no query of the block sees a key: nobody asks for scores
    last_tile = 0;
  }

  // The same for a whole warp, and the compiler is to know it.
  const int group = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  score_group<rows, residual, sink>(map, arguments, shared, group, piece,
                                    {arguments.deal, piece, first_tile}, last_tile, pass);
}

template <int rows, bool residual, Sink sink>
__global__ void __launch_bounds__(kThreads, 1)
    score_kernel(const __grid_constant__ CUtensorMap map,
                 const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<rows>*>(memory);
  constexpr int kQueries = ProductColumns<rows>::kBlockQueries;
  const Deal& deal = arguments.deal;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], kGroups);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  // Unsigned, for division takes fewer registers so.
  const auto blocks = static_cast<unsigned>((arguments.problem.q.tokens + kQueries - 1) / kQueries);
  const unsigned parts_each = deal.parts;
  const unsigned share = deal.share;
  std::uint32_t pass = 0;
  unsigned part = blockIdx.x * share;
  const unsigned last_part = min(part + share, blocks * parts_each);
  while (part < last_part) {
    const unsigned block = part / parts_each;
    const unsigned first_part = part % parts_each;
    const unsigned parts = min(last_part - part, parts_each - first_part);
    const unsigned list = blockIdx.x - block * parts_each / share;
    score_piece<rows, residual, sink>(
        map, arguments, shared,
        {std::int64_t{block} * kQueries, static_cast<int>(first_part), static_cast<int>(parts),
         static_cast<int>(list), first_part + parts == parts_each},
        pass);
    if constexpr (sink == Sink::samples || !takes_pieces(rows)) {
      return;
    }
    part += parts;
    __syncthreads();
  }
}

CUtensorMap key_map(const Keys& k, std::int64_t rows, std::int64_t stride, int tile) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) {
      throw Error(ErrorCode::unsupported, "cuTensorMapEncodeTiled: not in this driver");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {kDim, static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {kDim, static_cast<cuuint32_t>(tile)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(k.data), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::internal,
                "cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

template <Sink sink>
void launch(const Arguments& arguments, void* stream) {
  const Keys& k = arguments.problem.k;
  // Without keys there are no tiles, and nothing reads the map.
  const CUtensorMap map =
      arguments.key_rows > 0
          ? key_map(k, arguments.key_rows, k.stride * arguments.key_stride, TileOf<sink>::kKeys)
          : CUtensorMap{};
  score::for_rows(arguments.rows, [&]<int rows, bool residual>() {
    const auto kernel = score_kernel<rows, residual, sink>;
    const std::int64_t blocks =
        (arguments.problem.q.tokens + ProductColumns<rows>::kBlockQueries - 1) /
        ProductColumns<rows>::kBlockQueries;
    const Deal& deal = arguments.deal;
    launch_kernel("fused scores", kernel,
                  dim3(static_cast<unsigned>((blocks * deal.parts + deal.share - 1) / deal.share)),
                  kThreads, sizeof(Shared<rows>), stream, map, arguments);
  });
}

}  // namespace

void launch_samples(const Problem& problem, const score::ActiveRows& rows, const WorkPlan& layout,
                    const float* scales, float* scores, void* stream) {
  launch<Sink::samples>({problem,
                         rows,
                         layout.sampled,
                         layout.sample_stride,
                         layout.samples,
                         scales,
                         nullptr,
                         {},
                         scores},
                        stream);
}

void launch_candidates(const Problem& problem, const score::ActiveRows& rows,
                       const WorkPlan& layout, const float* scales, const float* thresholds,
                       const Candidates& out, void* stream) {
  launch<Sink::candidates>(
      {problem, rows, layout.all, 1, problem.k.tokens, scales, thresholds, out, nullptr}, stream);
}

}  // namespace misa::cuda::fused
