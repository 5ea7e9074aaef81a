// SPDX-License-Identifier: Apache-2.0
// Scores of paged keys, which are read once. The queries of a sequence form query groups, whose
// rows are the columns of one or two products. Every thread block scores an equal number of
// consecutive tiles of the sequence of all groups' tiles, so it ends one group and starts others.
//
//  1. Each thread counts the tiles of some groups. A scan over these counts tells the thread block
//     where its tiles begin. The first thread block writes how long the rows are.
//  2. The producer warps, one for each warpgroup, look the pages of tiles up in the block table, 32
//     tiles at a time, and fetch their keys and scales by TMA. With each tile they tell the
//     warpgroups whose it is, so that these cannot disagree about the work even if the lengths in
//     memory change. Rounds of four tiles belong to one group: the last round of a group may have
//     empty stages.
//  3. When a round belongs to another group than the one before it, the warpgroups load the rows of
//     the group's queries as the B operand. Those of the first group are loaded at once.
//  4. Each warpgroup multiplies its tile by the columns (N), 64 keys at a time (M).
//  5. Each lane of a quad clips and adds up its columns of a slice. If these are all rows of its
//     own query, that is the score; otherwise two lanes add up the four sums (the order of
//     score/sm90_fp8_rows.cuh).
//  6. Multiply by the key's scale and store.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cuda/ptx>
#include <limits>

#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/warp.cuh"
#include "score/row_lengths.cuh"
#include "score/sm90_paged.hpp"
#include "score/sm90_paged_work.cuh"

namespace misa::cuda::score {

inline constexpr float kPagedNaN = std::numeric_limits<float>::quiet_NaN();

// The shape of a kernel: the format of its keys (below), how many slices of columns its products
// have, how many columns of a slice each lane of a quad has, and whether a slice has four queries.
template <class KeyFormat, int slice_count, int columns_of_lane, bool is_packed, bool has_residual>
struct Spec {
  using Keys = KeyFormat;
  static constexpr int slices = slice_count;
  static constexpr int lane_columns = columns_of_lane;
  static constexpr int slice_columns = 4 * lane_columns;
  static constexpr int lane_weights = lane_columns + 4;
  static constexpr bool packed = is_packed;
  static constexpr bool residual = has_residual;
  static constexpr int queries = slices * (packed ? 4 : 1);                 // of a group, at most
  static constexpr int products = slices > 2 ? slices / 2 : 1;              // of 64 keys
  static constexpr int product_slices = slices / products;                  // of a product
  static constexpr int query_rows = packed ? lane_columns : slice_columns;  // of a query
  using Shared = PagedShared<Keys, slices, lane_columns, queries>;
};

__device__ inline void consumers_sync() { barrier_sync(1, kConsumers); }

// Step 3: loads the rows of a group's queries and their weights.
template <class Spec>
__device__ void start_group(const PagedArguments& arguments, std::int32_t first,
                            typename Spec::Shared& shared) {
  const auto& [q, w, k] = arguments.problem;
  const ActiveRows& rows = arguments.rows;
  const std::int32_t queries = group_at<typename Spec::Keys>(arguments, first).queries;
  constexpr int kChunks = kDim / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < Spec::slices * Spec::slice_columns * 2; i += kConsumers) {
    const int column = i / 2;  // two threads load a row
    const int first_chunk = i % 2 * (kChunks / 2);
    const int slice = column / Spec::slice_columns;
    const int lane = column % 8 / 2;
    const int lane_column = column % Spec::slice_columns / 8 * 2 + column % 2;
    const int row = Spec::packed ? lane_column : lane * Spec::lane_columns + lane_column;
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
    } else if (Spec::residual && rows.residual != nullptr && query < queries &&
               row == Spec::query_rows - 1) {
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
      shared.weights[slice][lane * Spec::lane_weights + lane_column] = weight;
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
  const bool has_linear = Spec::residual && lane % 4 == 3;
#pragma unroll
  for (int i = 0; i < Spec::lane_columns; i += 4) {
    const float weight[4] = {lane_weights[i], lane_weights[i + 1], lane_weights[i + 2],
                             lane_weights[i + 3]};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = sums[(i + j) / 2 * 4 + 2 * r + j % 2];
        if (!nonnegative_scales) {
          x = copysignf(1.0F, scales[r]) * x;
        }
        float w = weight[j];
        if (Spec::residual && i + j == Spec::lane_columns - 1) {
          linear[r] = x;
          linear_weight = w;
          if (Spec::packed) {
            continue;
          }
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

// What a thread keeps in registers for as long as its warpgroup scores one group: where its scores
// go; and, if there is one slice, its weights and how long the row is from the thread's first key
// on.
template <class Spec>
struct ThreadGroup {
  static constexpr bool held = Spec::slices == 1;
  float* out;  // of slice 0, position 0
  std::int32_t held_length;
  float held_weights[Spec::lane_columns];

  __device__ ThreadGroup(const PagedArguments& arguments, const typename Spec::Shared& shared,
                         std::int32_t first, int row, int lane) {
    out = arguments.scores.data + (first + query(lane)) * arguments.scores.columns +
          offset(row, lane);
    if constexpr (held) {
      held_length = length(shared, 0, row, lane);
#pragma unroll
      for (int i = 0; i < Spec::lane_columns; ++i) {
        held_weights[i] = shared.weights[0][lane % 4 * Spec::lane_weights + i];
      }
    }
  }

  // In a packed slice, a lane has two scores of its own query. Else lane 0 of a quad has the first
  // key's score and lane 1 the second's.
  static __device__ int query(int lane) { return Spec::packed ? lane % 4 : 0; }
  static __device__ int offset(int row, int lane) {
    return row + (!Spec::packed && lane % 4 == 1 ? 8 : 0);
  }
  static __device__ std::int32_t length(const typename Spec::Shared& shared, int slice, int row,
                                        int lane) {
    const int index = Spec::packed ? slice * 4 + query(lane) : slice;
    return Spec::packed || lane % 4 < 2 ? shared.lengths[index] - offset(row, lane) : 0;
  }
};

// The scales of a thread's two keys, `row` and row + 8 of a tile; NaN for keys that score NaN.
template <class Keys>
__device__ void key_scales(const PagedArguments& arguments, const TileInfo& info,
                           const float (&read)[2], int row, float (&scales)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    scales[r] = Keys::signed_scales && !isfinite(read[r]) ? kPagedNaN : read[r];
  }
  if (info.bad_parts != 0) {
    const int part_bits =
        min(arguments.problem.k.page_bits, std::bit_width(unsigned{Keys::tile_keys}) - 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool bad = (info.bad_parts >> ((row + 8 * r) >> part_bits) & 1) != 0;
      scales[r] = bad ? kPagedNaN : scales[r];
    }
  }
}

// Steps 5 and 6 for the slices of a product, from the first one on; the block's first key is at
// `position`.
template <class Spec, int count>
__device__ void store(const typename Spec::Shared& shared, const ThreadGroup<Spec>& group,
                      const float (&sums)[count], const float (&scales)[2], bool negative,
                      int first_slice, std::int32_t position, int row, int lane,
                      std::int64_t slice_stride) {
#pragma unroll
  for (int i = 0; i < Spec::product_slices; ++i) {
    const int slice = first_slice + i;
    const float* weights = shared.weights[slice] + lane % 4 * Spec::lane_weights;
    std::int32_t length = 0;
    if constexpr (ThreadGroup<Spec>::held) {
      weights = group.held_weights;
      length = group.held_length;
    } else {
      length = group.length(shared, slice, row, lane);
    }
    const float* slice_sums = sums + i * Spec::slice_columns / 2;
    float total[2];
    if (negative) {
      sum_slice<Spec, false>(slice_sums, weights, scales, total);
    } else {
      sum_slice<Spec, true>(slice_sums, weights, scales, total);
    }
    float* const out = group.out + slice * slice_stride + position;
    if constexpr (Spec::packed) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (position + 8 * r < length) {
          __stcs(out + 8 * r, __fmul_rn(total[r], fabsf(scales[r])));
        }
      }
    } else if (position < length) {
      __stcs(out, __fmul_rn(total[0], fabsf(lane % 2 != 0 ? scales[1] : scales[0])));
    }
  }
}

// Steps 3 to 6: the four warpgroups.
template <class Spec>
__device__ void consume(const PagedArguments& arguments, typename Spec::Shared& shared,
                        const Work& work, int warpgroup) {
  using Keys = typename Spec::Keys;
  constexpr int kColumns = Spec::product_slices * Spec::slice_columns;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;  // the thread's first key; the second is row + 8
  const std::uint64_t row_tile = swizzled_tile(shared.rows);
  // The rows of the first group are loaded while its first tiles are fetched.
  std::int32_t current = work.query;  // the group's first query
  start_group<Spec>(arguments, current, shared);
  consumers_sync();
  ThreadGroup<Spec> group(arguments, shared, current, row, lane);
  const typename Keys::Thread thread_keys(shared.constants);
  const std::int64_t slice_stride = (Spec::packed ? 4 : 1) * arguments.scores.columns;

  for (std::uint32_t iteration = warpgroup;; iteration += kPagedWarpgroups) {
    const std::uint32_t stage = iteration % Keys::stages;
    while (!ptx::mbarrier_try_wait_parity(&shared.full[stage], iteration / Keys::stages % 2)) {
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
      group = ThreadGroup<Spec>(arguments, shared, current, row, lane);
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
    constexpr int kBlocks = Keys::tile_keys / kProductKeys;
    constexpr int kTogether = Spec::slice_columns <= 32 ? kBlocks : 1;  // as registers allow
#pragma unroll
    for (int block = 0; block < kBlocks; block += kTogether) {
      float scales[kTogether][2];
      bool negative[kTogether];  // whether a scale of the warp is
#pragma unroll
      for (int product = 0; product < Spec::products; ++product) {
        const bool is_last = block + kTogether == kBlocks && product == Spec::products - 1;
        typename Keys::template Tile<kColumns> tiles[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {  // step 4
          tiles[i].load(shared.tiles[stage], thread_keys, row + (block + i) * kProductKeys, lane);
        }
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          tiles[i].multiply(row_tile + product * (kColumns * kDim / 16));
        }
        wgmma_commit();
        if (!Keys::in_shared && is_last) {
          release();
        }
        if (product == 0) {
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            key_scales<Keys>(arguments, info, tiles[i].scale, row + (block + i) * kProductKeys,
                             scales[i]);
            negative[i] =
                Keys::signed_scales && __any_sync(kFullMask, (__float_as_int(scales[i][0]) |
                                                              __float_as_int(scales[i][1])) < 0);
          }
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          wgmma_pin(tiles[i].sums);
        }
        if (Keys::in_shared && is_last) {
          release();
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          store<Spec>(
              shared, group, tiles[i].sums, scales[i], negative[i], product * Spec::product_slices,
              info.tile * Keys::tile_keys + (block + i) * kProductKeys, row, lane, slice_stride);
        }
      }
    }
  }
}

template <class Spec>
__global__ void __launch_bounds__(kPagedThreads, 1)
    paged_kernel(const __grid_constant__ typename Spec::Keys::Source source,
                 const __grid_constant__ PagedArguments arguments) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Spec::Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Spec::Keys::stages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], kWarpgroupThreads / 32);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  Spec::Keys::prepare(shared.constants);
  begin_kernel();
  if (blockIdx.x == 0) {
    for (std::int64_t t = threadIdx.x; t < arguments.problem.q.tokens; t += kPagedThreads) {
      write_length(arguments.lengths, t, visible(arguments.problem.k, t).length);
    }
  }
  const Work work = find_work<typename Spec::Keys>(arguments, shared);
  if (work.tiles <= 0) {
    return;
  }
  const int warpgroup =
      __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0);
  if (warpgroup == kPagedWarpgroups) {
    give_registers<kProducerRegisters>();
    const int producer = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) % kProducers / 32, 0);
    produce<typename Spec::Keys>(source, arguments, shared, work, producer);
  } else {
    take_registers<kConsumerRegisters>();
    consume<Spec>(arguments, shared, work, warpgroup);
  }
}

template <class Spec>
void launch(const typename Spec::Keys::Source& source, const PagedArguments& arguments, int num_sms,
            void* stream) {
  launch_kernel("paged scores", paged_kernel<Spec>, dim3(static_cast<unsigned>(num_sms)),
                kPagedThreads, sizeof(typename Spec::Shared), stream, source, arguments);
}

// Whether there is anything to score. If not, the rows have no length.
inline bool any_keys(const PagedProblem& problem, const RowLengths& lengths, void* stream) {
  if (problem.q.tokens > 0 && problem.k.pages == 0) {
    launch_row_lengths(problem.k, problem.q.tokens, Columns{nullptr, 0, 1}, lengths, stream);
  }
  return problem.q.tokens > 0 && problem.k.pages > 0;
}

// How many queries a sequence may have, as far as the host knows.
inline std::int64_t most_queries(const PagedProblem& problem) {
  return problem.k.query_starts != nullptr ? problem.q.tokens : std::int64_t{problem.k.next_n};
}

}  // namespace misa::cuda::score
