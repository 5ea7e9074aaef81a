// SPDX-License-Identifier: Apache-2.0
// What the thread blocks of paged scoring (sm90_paged.cuh) do: steps 1 and 2.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cuda/ptx>

#include "cuda/key_source.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/warp.cuh"
#include "score/columns.hpp"
#include "score/sm90_fp8.hpp"
#include "score/sm90_paged_config.cuh"

namespace misa::cuda::score {

namespace ptx = ::cuda::ptx;

struct PagedArguments {
  ProblemOf<DevicePagedSource> problem;
  ActiveRows rows;
  std::int32_t unscored;
  std::int32_t group_queries;  // at most Spec::queries
  Scores scores;
  RowLengths lengths;
};

// A format of keys, `Keys`, says what a tile holds and how it is multiplied:
//
//   tile_keys                64 or 128
//   key_bytes, scale_bytes   of one key: first come a page's keys, then their scales; and so in a
//                            tile, of tile_bytes
//   stages                   tiles in flight
//   signed_scales            whether scales may be negative
//   Source                   where pages are, an argument of the kernel
//   Constants                a part of the shared memory, written once by prepare(constants)
//   Thread                   what a thread keeps of them
//   fetch(source, ...)       starts copying keys of one page into a tile, from a key of it on
//   Tile<columns>            a block of a tile: load(...) reads its operand and, in scale[0] and
//                            scale[1], the scales of the thread's two keys; multiply(rows) starts
//                            the products with `columns` columns, of which sums are the result.
//                            If `in_shared`, they read the tile until they are done.

// Up to group_queries consecutive queries of one sequence, from `query` on.
struct Group {
  std::int32_t query;
  std::int32_t queries;  // 0: `query` is not the first one of a group
  std::int32_t keys;     // of the longest row; 0 if no row is scored
  std::int32_t tiles;
};

// The group of query t of the chunk, if it is the first one of its group. A query that belongs to
// no sequence has a group of its own, without keys.
template <class Keys>
__device__ Group group_at(const PagedArguments& arguments, std::int32_t t) {
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
  group.tiles = (group.keys + Keys::tile_keys - 1) / Keys::tile_keys;
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
template <class Keys, class Shared>
__device__ Work find_work(const PagedArguments& arguments, Shared& shared) {
  const auto tokens = static_cast<std::int32_t>(arguments.problem.q.tokens);
  const std::int32_t each = (tokens + kPagedThreads - 1) / kPagedThreads;
  const std::int32_t first = min(static_cast<std::int32_t>(threadIdx.x) * each, tokens);
  const std::int32_t end = min(first + each, tokens);
  std::int64_t sum = 0;
  for (std::int32_t t = first; t < end; ++t) {
    sum += group_at<Keys>(arguments, t).tiles;
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
      const std::int32_t tiles = group_at<Keys>(arguments, t).tiles;
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
template <class Keys>
struct TilePages {
  static constexpr int parts = Keys::tile_keys / kSmallestPage;
  std::int32_t page[parts];
};

template <class Keys>
__device__ TilePages<Keys> pages_of_tile(const DevicePagedSource& keys, const Run& run,
                                         std::int32_t tile) {
  TilePages<Keys> pages{};
  const std::int32_t part_keys = min(1 << keys.page_bits, Keys::tile_keys);
  const std::int32_t* row = keys.block_table + run.sequence * keys.table_stride;
#pragma unroll
  for (int part = 0; part < TilePages<Keys>::parts; ++part) {
    const std::int32_t position = tile * Keys::tile_keys + part * part_keys;
    std::int32_t page = -1;
    if (part * part_keys < Keys::tile_keys && position < run.keys) {
      page = __ldg(row + (position >> keys.page_bits));
    }
    pages.page[part] = page >= 0 && page < keys.pages ? page : -1;
  }
  return pages;
}

// The runs of a thread block, one after the other; for one thread.
template <class Keys>
class Runs {
 public:
  __device__ explicit Runs(const Work& work)
      : query_(work.query), first_(work.first_tile), remaining_(work.tiles) {}

  __device__ Run next(const PagedArguments& arguments) {
    Run run{-1, 0, 0, 0, 0};
    while (remaining_ > 0 && query_ < arguments.problem.q.tokens && run.query < 0) {
      const Group group = group_at<Keys>(arguments, query_);
      const auto end =
          static_cast<std::int32_t>(min(std::int64_t{group.tiles}, first_ + remaining_));
      if (first_ < end) {
        run = {query_, sequence_of(arguments.problem.k, query_), group.keys, first_, end};
        remaining_ -= end - first_;
      }
      first_ = 0;
      query_ += max(group.queries, 1);
    }
    return run;
  }

 private:
  std::int32_t query_;
  std::int32_t first_;
  std::int64_t remaining_;
};

// Step 2: one warp for each warpgroup. The first thread of the first warp says what the next run
// is, so that they agree about it.
template <class Keys, class Shared>
__device__ void produce(const typename Keys::Source& source, const PagedArguments& arguments,
                        Shared& shared, const Work& work, int warpgroup) {
  const DevicePagedSource& keys = arguments.problem.k;
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  const std::uint64_t policy = evict_first_policy();
  const std::int32_t part_keys = min(1 << keys.page_bits, Keys::tile_keys);
  const std::uint32_t part_bytes = part_keys * (Keys::key_bytes + Keys::scale_bytes);
  const std::int32_t page_mask = (1 << keys.page_bits) - 1;
  std::uint32_t iteration = warpgroup;  // counts stages, of all warpgroups
  // Fills the warpgroup's next stage; `pages` are those of the tile's parts.
  const auto fill = [&](TileInfo info, const TilePages<Keys>& pages) {
    const std::uint32_t stage = iteration % Keys::stages;
    if (iteration >= Keys::stages) {
      while (!ptx::mbarrier_try_wait_parity(&shared.empty[stage],
                                            (iteration / Keys::stages - 1) % 2)) {
      }
    }
    iteration += kPagedWarpgroups;
    if (elect_lane()) {
      std::uint64_t* full = &shared.full[stage];
      std::uint32_t bytes = 0;
#pragma unroll
      for (int part = 0; part < TilePages<Keys>::parts; ++part) {
        info.bad_parts |= pages.page[part] < 0 ? 1 << part : 0;
        bytes += pages.page[part] < 0 ? 0 : part_bytes;
      }
      shared.info[stage] = info;
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full,
                                     bytes);
#pragma unroll
      for (int part = 0; part < TilePages<Keys>::parts; ++part) {
        if (pages.page[part] >= 0) {
          const std::int32_t slot = (info.tile * Keys::tile_keys + part * part_keys) & page_mask;
          Keys::fetch(source, keys, pages.page[part], slot, part_keys, shared.tiles[stage],
                      part * part_keys, full, policy);
        }
      }
    }
    __syncwarp();
  };
  TilePages<Keys> no_pages;
#pragma unroll
  for (std::int32_t& page : no_pages.page) {
    page = -1;
  }

  Runs<Keys> runs(work);
  for (int i = 0;; ++i) {
    Run& shared_run = shared.runs[i % 2];
    if (warpgroup == 0 && lane == 0) {
      shared_run = runs.next(arguments);
    }
    barrier_sync(2, kProducers);
    const Run run = shared_run;
    if (run.query < 0) {
      break;
    }
    // The warp's tiles are each fourth one from its first on.
    const std::int32_t first = run.first + warpgroup;
    const std::int32_t rounds = (run.end - run.first + kPagedWarpgroups - 1) / kPagedWarpgroups;
    TilePages<Keys> next = pages_of_tile<Keys>(keys, run, first + kPagedWarpgroups * lane);
    TilePages<Keys> pages = next;
    for (std::int32_t round = 0; round < rounds; ++round) {
      if (round % 32 == 0) {
        pages = next;
        next = pages_of_tile<Keys>(keys, run, first + kPagedWarpgroups * (round + 32 + lane));
      }
      const std::int32_t tile = first + kPagedWarpgroups * round;
      TilePages<Keys> tile_pages;
#pragma unroll
      for (int part = 0; part < TilePages<Keys>::parts; ++part) {
        tile_pages.page[part] = __shfl_sync(kFullMask, pages.page[part], round % 32);
      }
      if (tile < run.end) {
        fill({run.query, tile, 0}, tile_pages);
      } else {
        fill({run.query, -1, 0}, no_pages);
      }
    }
  }
  fill({-1, -1, 0}, no_pages);
}

}  // namespace misa::cuda::score
