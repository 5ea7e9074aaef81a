// SPDX-License-Identifier: Apache-2.0
// Scores of paged keys, which are read once. The queries of a sequence form query groups, whose
// rows are the columns of one or two products. Every thread block scores an equal number of
// consecutive tiles of the sequence of all groups' tiles, so it ends one group and starts others.
//
//  1. Each thread counts the tiles of some groups. A scan over these counts tells the thread block
//     where its tiles begin.
//  2. The producer warp looks the pages of the tiles up in the block table, 32 tiles at a time, and
//     fetches their keys and scales by TMA. With each tile it tells the consumers whose it is, so
//     they cannot disagree about the work even if the lengths in memory change. Rounds of four
//     tiles belong to one group: the last round of a group may have empty stages.
//  3. When a round belongs to another group than the one before it, the warpgroups load the rows of
//     the group's queries as the B operand.
//  4. Each warpgroup multiplies the 64 keys of its tile (M) by the columns (N).
//  5. Each lane of a quad clips and adds up its 16 columns of a slice. If these are all rows of its
//     own query, that is the score; otherwise two lanes add up the four sums (the order of
//     score/sm90_fp8_rows.cuh).
//  6. Multiply by the key's scale and store.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cuda/ptx>
#include <limits>

#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.hpp"
#include "cuda/warp.cuh"
#include "score/sm90_fp8_paged.hpp"
#include "score/sm90_fp8_paged_config.cuh"

namespace misa::cuda::score {
namespace {

namespace ptx = ::cuda::ptx;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct PagedArguments {
  ProblemOf<DevicePagedSource> problem;
  ActiveRows rows;
  std::int32_t unscored;
  std::int32_t group_queries;  // at most Spec::queries
  Scores scores;
};

// The shape of a kernel: how many slices of columns its products have, and whether a slice has four
// queries.
template <int slice_count, bool is_packed, bool has_residual>
struct Spec {
  static constexpr int slices = slice_count;
  static constexpr bool packed = is_packed;
  static constexpr bool residual = has_residual;
  static constexpr int queries = slices * (packed ? 4 : 1);                   // of a group, at most
  static constexpr int products = slices > 2 ? slices / 2 : 1;                // of 64 keys
  static constexpr int product_slices = slices / products;                    // of a product
  static constexpr int query_rows = packed ? kMaxPackedRows : kSliceColumns;  // of a query
  using Shared = PagedShared<slices, queries>;
};

// Up to group_queries consecutive queries of one sequence, from `query` on.
struct Group {
  std::int32_t query;
  std::int32_t queries;  // 0: `query` is not the first one of a group
  std::int32_t keys;     // of the longest row; 0 if no row is scored
  std::int32_t tiles;
};

// The group of query t of the chunk, if it is the first one of its group. A query that belongs to
// no sequence has a group of its own, without keys.
__device__ inline Group group_at(const PagedArguments& arguments, std::int32_t t) {
  const DevicePagedSource& keys = arguments.problem.k;
  const QueryRange call = queries_of(keys, sequence_of(keys, t));
  // A chunk may begin and end inside a sequence.
  const auto first = static_cast<std::int32_t>(max(call.first - keys.first_query, std::int64_t{0}));
  const auto end =
      static_cast<std::int32_t>(min(call.end - keys.first_query, arguments.problem.q.tokens));
  Group group{t, 1, 0, 0};
  if (t < first || t >= end) {
    return group;
  }
  if ((t - first) % arguments.group_queries != 0) {
    group.queries = 0;
    return group;
  }
  group.queries = min(arguments.group_queries, end - t);
  std::int32_t longest = 0;
  for (std::int32_t i = 0; i < group.queries; ++i) {
    longest = max(longest, visible(keys, t + i).length);
  }
  group.keys = longest > arguments.unscored ? longest : 0;
  group.tiles = (group.keys + kPagedTile - 1) / kPagedTile;
  return group;
}

// What a thread block does: `tiles` consecutive tiles, from tile `first_tile` of the group of query
// `query` on.
struct Work {
  std::int64_t tiles;
  std::int32_t first_tile;
  std::int32_t query;
};

// Step 1.
template <class Shared>
__device__ Work find_work(const PagedArguments& arguments, Shared& shared) {
  const auto tokens = static_cast<std::int32_t>(arguments.problem.q.tokens);
  const std::int32_t each = (tokens + kPagedThreads - 1) / kPagedThreads;
  const std::int32_t first = min(static_cast<std::int32_t>(threadIdx.x) * each, tokens);
  const std::int32_t end = min(first + each, tokens);
  std::int64_t sum = 0;
  for (std::int32_t t = first; t < end; ++t) {
    sum += group_at(arguments, t).tiles;
  }
  std::int64_t before = sum;  // inclusive at first
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const std::int64_t other = __shfl_up_sync(kFullMask, before, step);
    before += threadIdx.x % 32 >= step ? other : 0;
  }
  if (threadIdx.x % 32 == 31) {
    shared.warp_sums[threadIdx.x / 32] = before;
  }
  __syncthreads();
  std::int64_t total = 0;
  for (unsigned warp = 0; warp < kPagedThreads / 32; ++warp) {
    before += warp < threadIdx.x / 32 ? shared.warp_sums[warp] : 0;
    total += shared.warp_sums[warp];
  }
  before -= sum;
  const std::int64_t begin = total * blockIdx.x / gridDim.x;
  const std::int64_t stop = total * (blockIdx.x + 1) / gridDim.x;
  if (begin >= before && begin < before + sum) {  // one thread
    std::int32_t t = first;
    for (; t < end - 1; ++t) {
      const std::int32_t tiles = group_at(arguments, t).tiles;
      if (begin < before + tiles) {
        break;
      }
      before += tiles;
    }
    shared.first_query = t;
    shared.first_tiles = before;
  }
  __syncthreads();
  return {stop - begin, static_cast<std::int32_t>(begin - shared.first_tiles), shared.first_query};
}

// Which pages the parts of a tile are in; -1 for a page that does not exist, and for parts that
// begin after the group's last key.
struct TilePages {
  std::int32_t page[kMaxTileParts];
};

__device__ inline TilePages pages_of_tile(const DevicePagedSource& keys, std::int32_t sequence,
                                          const Group& group, std::int32_t tile) {
  TilePages pages{};
  const std::int32_t part_keys = min(1 << keys.page_bits, kPagedTile);
  const std::int32_t* row = keys.block_table + sequence * keys.table_stride;
#pragma unroll
  for (int part = 0; part < kMaxTileParts; ++part) {
    const std::int32_t position = tile * kPagedTile + part * part_keys;
    std::int32_t page = -1;
    if (part * part_keys < kPagedTile && position < group.keys) {
      page = __ldg(row + (position >> keys.page_bits));
    }
    pages.page[part] = page >= 0 && page < keys.pages ? page : -1;
  }
  return pages;
}

// Step 2: one warp.
template <class Shared>
__device__ void produce(const CUtensorMap& map, const PagedArguments& arguments, Shared& shared,
                        const Work& work) {
  const DevicePagedSource& keys = arguments.problem.k;
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  const std::uint64_t policy = evict_first_policy();
  const std::int32_t part_keys = min(1 << keys.page_bits, kPagedTile);
  const std::uint32_t part_bytes = part_keys * (kDim + static_cast<std::uint32_t>(sizeof(float)));
  const std::int32_t page_mask = (1 << keys.page_bits) - 1;
  const auto* first_scales = reinterpret_cast<const std::uint8_t*>(page_scales(keys, 0));
  std::uint32_t iteration = 0;  // stages filled so far
  // Fills the next stage; `pages` are those of the tile's parts.
  const auto fill = [&](TileInfo info, const TilePages& pages) {
    const std::uint32_t stage = iteration % kPagedStages;
    if (iteration >= kPagedStages) {
      while (!ptx::mbarrier_try_wait_parity(&shared.empty[stage],
                                            (iteration / kPagedStages - 1) % 2)) {
      }
    }
    ++iteration;
    if (elect_lane()) {
      std::uint64_t* full = &shared.full[stage];
      std::uint32_t bytes = 0;
#pragma unroll
      for (int part = 0; part < kMaxTileParts; ++part) {
        info.bad_parts |= pages.page[part] < 0 ? 1 << part : 0;
        bytes += pages.page[part] < 0 ? 0 : part_bytes;
      }
      shared.info[stage] = info;
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full,
                                     bytes);
#pragma unroll
      for (int part = 0; part < kMaxTileParts; ++part) {
        if (pages.page[part] >= 0) {
          const std::int32_t slot = (info.tile * kPagedTile + part * part_keys) & page_mask;
          copy_box(shared.keys[stage] + part * part_keys * kDim, map, slot, pages.page[part], full,
                   policy);
          copy_bulk(shared.scales[stage] + part * part_keys,
                    first_scales + pages.page[part] * keys.page_stride + slot * sizeof(float),
                    part_keys * static_cast<std::uint32_t>(sizeof(float)), full, policy);
        }
      }
    }
    __syncwarp();
  };
  constexpr TilePages kNoPages{{-1, -1}};

  std::int32_t t = work.query;
  std::int32_t begin = work.first_tile;
  for (std::int64_t remaining = work.tiles; remaining > 0 && t < arguments.problem.q.tokens;) {
    const Group group = group_at(arguments, t);
    const auto end = static_cast<std::int32_t>(min(std::int64_t{group.tiles}, begin + remaining));
    if (begin < end) {
      const std::int32_t sequence = sequence_of(keys, t);
      TilePages next = pages_of_tile(keys, sequence, group, begin + lane);
      for (std::int32_t first = begin; first < end; first += 32) {
        const TilePages pages = next;
        next = pages_of_tile(keys, sequence, group, first + 32 + lane);
        for (std::int32_t i = 0; i < min(32, end - first); ++i) {
          TilePages tile_pages;
#pragma unroll
          for (int part = 0; part < kMaxTileParts; ++part) {
            tile_pages.page[part] = __shfl_sync(kFullMask, pages.page[part], i);
          }
          fill({t, first + i, 0}, tile_pages);
        }
      }
      while (iteration % kPagedWarpgroups != 0) {
        fill({t, -1, 0}, kNoPages);
      }
      remaining -= end - begin;
    }
    begin = 0;
    t += max(group.queries, 1);
  }
  for (int i = 0; i < kPagedWarpgroups; ++i) {
    fill({-1, -1, 0}, kNoPages);
  }
}

__device__ inline void consumers_sync() { barrier_sync(1, kConsumers); }

// Step 3: loads the rows of a group's queries and their weights.
template <class Spec>
__device__ void start_group(const PagedArguments& arguments, std::int32_t first,
                            typename Spec::Shared& shared) {
  const auto& [q, w, k] = arguments.problem;
  const ActiveRows& rows = arguments.rows;
  const std::int32_t queries = group_at(arguments, first).queries;
  constexpr int kChunks = kDim / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < Spec::slices * kSliceColumns * 2; i += kConsumers) {
    const int column = i / 2;  // two threads load a row
    const int first_chunk = i % 2 * (kChunks / 2);
    const int slice = column / kSliceColumns;
    const int lane = column % 8 / 2;
    const int lane_column = column % kSliceColumns / 8 * 2 + column % 2;
    const int row = Spec::packed ? lane_column : lane * kSliceLaneColumns + lane_column;
    const int query = Spec::packed ? slice * 4 + lane : slice;
    const std::int64_t t = first + query;
    const std::uint8_t* source = nullptr;
    float weight = 0;
    if (query < queries && row < rows.head_count) {
      const std::int32_t head = rows.heads == nullptr ? row : rows.heads[t * rows.head_count + row];
      if (is_head(q, head)) {
        source =
            static_cast<const std::uint8_t*>(q.data) + t * q.token_stride + head * q.head_stride;
        weight = w.data[t * w.token_stride + head];
      }
    } else if (Spec::residual && query < queries && row == Spec::query_rows - 1) {
      source = rows.residual + t * kDim;
      weight = rows.residual_scale[t];
    }
#pragma unroll
    for (int j = 0; j < kChunks / 2; ++j) {
      const int chunk = first_chunk + j;
      const uint4 bytes = source == nullptr ? make_uint4(0, 0, 0, 0)
                                            : *(reinterpret_cast<const uint4*>(source) + chunk);
      *reinterpret_cast<uint4*>(shared.rows + column * kDim + (chunk ^ column % 8) * 16) = bytes;
    }
    if (first_chunk == 0) {
      shared.weights[slice][lane * kSliceLaneWeights + lane_column] = weight;
    }
  }
  if (threadIdx.x < Spec::queries) {
    const auto query = static_cast<std::int32_t>(threadIdx.x);
    const std::int64_t length =
        query < queries ? visible(k, std::int64_t{first} + query).length : 0;
    shared.lengths[query] = static_cast<std::int32_t>(min(length, arguments.scores.columns));
  }
  ptx::fence_proxy_async(ptx::space_shared);
}

// Step 5: the two keys' scores, without their scales, from the accumulators of one slice. In a
// packed slice these are the scores of the lane's own query; otherwise total[0] is that of the
// first key in lane 0 of a quad and of the second key in lane 1.
template <class Spec, bool nonnegative_scales>
__device__ void sum_slice(const float* sums, const float* lane_weights, const float (&scales)[2],
                          float (&total)[2]) {
  float groups[2] = {0, 0};
  float linear[2] = {0, 0};
  float linear_weight = 0;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool has_linear = Spec::residual && (Spec::packed || lane % 4 == 3);
#pragma unroll
  for (int i = 0; i < kSliceLaneColumns; i += 4) {
    const float4 packed = *reinterpret_cast<const float4*>(lane_weights + i);
    const float weight[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = sums[(i + j) / 2 * 4 + 2 * r + j % 2];
        if (!nonnegative_scales) {
          x = copysignf(1.0F, scales[r]) * x;
        }
        float w = weight[j];
        if (Spec::residual && i + j == kSliceLaneColumns - 1) {
          linear[r] = x;
          linear_weight = w;
          w = has_linear ? 0 : w;
        }
        groups[r] = __fmaf_rn(w, max_nan(x, 0), groups[r]);
      }
    }
  }
  if constexpr (Spec::packed) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] = Spec::residual ? __fmaf_rn(linear_weight, linear[r], groups[r]) : groups[r];
    }
  } else {
    // Lane 0 of a quad adds up the groups of the first key and lane 1 those of the second.
    const bool odd = lane % 2 != 0;
    const float lane_sum = odd ? groups[1] : groups[0];  // for the lane's own key
    const float other_sum = odd ? groups[0] : groups[1];
    const float neighbour = __shfl_xor_sync(kFullMask, other_sum, 1);
    const float across = __shfl_xor_sync(kFullMask, lane_sum, 2);
    const float opposite = __shfl_xor_sync(kFullMask, other_sum, 3);
    total[0] = __fadd_rn(lane_sum, neighbour);
    total[0] = __fadd_rn(__fadd_rn(total[0], odd ? opposite : across), odd ? across : opposite);
    if constexpr (Spec::residual) {
      const float first = __shfl_sync(kFullMask, linear[0], 3, 4);
      const float second = __shfl_sync(kFullMask, linear[1], 3, 4);
      const float weight_of_row = __shfl_sync(kFullMask, linear_weight, 3, 4);
      total[0] = __fmaf_rn(weight_of_row, odd ? second : first, total[0]);
    }
  }
}

// Steps 3 to 6: the four warpgroups.
template <class Spec>
__device__ void consume(const PagedArguments& arguments, typename Spec::Shared& shared,
                        int warpgroup) {
  constexpr int kColumns = Spec::product_slices * kSliceColumns;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;  // the thread's first key; the second is row + 8
  const std::int32_t part_bits = min(arguments.problem.k.page_bits, 6);  // 2^6 = kPagedTile
  const std::uint64_t row_tile = swizzled_tile(shared.rows);
  const std::uint64_t key_tiles = swizzled_tile(shared.keys);
  std::int32_t current = -1;  // the group's first query

  for (std::uint32_t iteration = warpgroup;; iteration += kPagedWarpgroups) {
    const std::uint32_t stage = iteration % kPagedStages;
    while (!ptx::mbarrier_try_wait_parity(&shared.full[stage], iteration / kPagedStages % 2)) {
    }
    const TileInfo info = shared.info[stage];
    if (info.query < 0) {
      break;
    }
    if (info.query != current) {
      consumers_sync();  // the rows of the previous group are not used any more
      current = info.query;
      start_group<Spec>(arguments, current, shared);
      consumers_sync();
    }
    const auto release = [&] {
      __syncwarp();
      if (lane == 0) {
        ptx::mbarrier_arrive(&shared.empty[stage]);
      }
    };
    if (info.tile < 0) {
      release();
      continue;
    }
    const std::uint64_t tile_keys = key_tiles + stage * (sizeof(shared.keys[0]) / 16);
    const std::int32_t position = info.tile * kPagedTile + row;
    float scales[2];
#pragma unroll
    for (int product = 0; product < Spec::products; ++product) {
      float sums[kColumns / 2];
      wgmma_fence();  // step 4
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<kColumns>(sums, tile_keys + 2 * k,
                             row_tile + product * (kColumns * kDim / 16) + 2 * k, k > 0);
      }
      wgmma_commit();
      if (product == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = row + 8 * r;
          const float scale = shared.scales[stage][key];
          const bool bad = (info.bad_parts >> (key >> part_bits) & 1) != 0;
          scales[r] = isfinite(scale) && !bad ? scale : kNaN;
        }
      }
      const bool negative =
          __any_sync(kFullMask, (__float_as_int(scales[0]) | __float_as_int(scales[1])) < 0);
      wgmma_wait<0>();
      wgmma_pin(sums);
      if (product == Spec::products - 1) {
        release();
      }
#pragma unroll
      for (int i = 0; i < Spec::product_slices; ++i) {
        const int slice = product * Spec::product_slices + i;
        const float* lane_weights = shared.weights[slice] + lane % 4 * kSliceLaneWeights;
        float total[2];
        if (negative) {
          sum_slice<Spec, false>(sums + i * kSliceColumns / 2, lane_weights, scales, total);
        } else {
          sum_slice<Spec, true>(sums + i * kSliceColumns / 2, lane_weights, scales, total);
        }
        const int query = Spec::packed ? slice * 4 + lane % 4 : slice;  // step 6
        const std::int32_t length = shared.lengths[query];
        float* const out =
            arguments.scores.data + (current + query) * arguments.scores.columns + position;
        if constexpr (Spec::packed) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (position + 8 * r < length) {
              out[8 * r] = __fmul_rn(total[r], fabsf(scales[r]));
            }
          }
        } else {
          const bool odd = lane % 2 != 0;
          const int offset = odd ? 8 : 0;
          if (lane % 4 < 2 && position + offset < length) {
            out[offset] = __fmul_rn(total[0], fabsf(odd ? scales[1] : scales[0]));
          }
        }
      }
    }
  }
}

template <class Spec>
__global__ void __launch_bounds__(kPagedThreads, 1)
    paged_kernel(const __grid_constant__ CUtensorMap map,
                 const __grid_constant__ PagedArguments arguments) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Spec::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPagedStages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], kWarpgroupThreads / 32);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  begin_kernel();
  const Work work = find_work(arguments, shared);
  if (work.tiles <= 0) {
    return;
  }
  const int warpgroup =
      __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == kPagedWarpgroups) {
    produce(map, arguments, shared, work);
  } else {
    consume<Spec>(arguments, shared, warpgroup);
  }
}

template <class Spec>
void launch(const PagedArguments& arguments, int num_sms, void* stream) {
  const DevicePagedSource& k = arguments.problem.k;
  const std::int32_t page_size = 1 << k.page_bits;
  const CUtensorMap map = tensor_map<3>(
      k.data, {kDim, static_cast<cuuint64_t>(page_size), static_cast<cuuint64_t>(k.pages)},
      {kDim, static_cast<cuuint64_t>(k.page_stride)},
      {kDim, static_cast<cuuint32_t>(std::min(page_size, kPagedTile)), 1});
  launch_kernel("paged scores", paged_kernel<Spec>, dim3(static_cast<unsigned>(num_sms)),
                kPagedThreads, sizeof(typename Spec::Shared), stream, map, arguments);
}

// How many slices hold the rows of so many queries.
int slices_for(std::int64_t queries, bool packed) {
  const std::int64_t of_slice = packed ? 4 : 1;
  return queries <= of_slice ? 1 : packed || queries <= 2 * of_slice ? 2 : 4;
}

template <bool packed, bool residual>
void launch_slices(const PagedArguments& arguments, int num_sms, void* stream) {
  const int slices = slices_for(arguments.group_queries, packed);
  if (slices == 1) {
    launch<Spec<1, packed, residual>>(arguments, num_sms, stream);
  } else if (slices == 2) {
    launch<Spec<2, packed, residual>>(arguments, num_sms, stream);
  } else if constexpr (!packed) {
    launch<Spec<4, packed, residual>>(arguments, num_sms, stream);
  }
}

}  // namespace

void launch_paged(const ProblemOf<DevicePagedSource>& problem, const ActiveRows& rows,
                  std::int32_t unscored, const Scores& scores, int num_sms, void* stream) {
  if (problem.q.tokens == 0 || problem.k.pages == 0) {
    return;
  }
  const bool packed = rows.count() <= kMaxPackedRows;
  const bool residual = rows.residual != nullptr;
  // How many queries a sequence may have, as far as the host knows.
  const std::int64_t queries =
      problem.k.query_starts != nullptr ? problem.q.tokens : std::int64_t{problem.k.next_n};
  const std::int64_t most = packed ? 8 : 4;
  const PagedArguments arguments{problem, rows, unscored,
                                 static_cast<std::int32_t>(std::min(queries, most)), scores};
  if (packed && residual) {
    launch_slices<true, true>(arguments, num_sms, stream);
  } else if (packed) {
    launch_slices<true, false>(arguments, num_sms, stream);
  } else if (residual) {
    launch_slices<false, true>(arguments, num_sms, stream);
  } else {
    launch_slices<false, false>(arguments, num_sms, stream);
  }
}

}  // namespace misa::cuda::score
