// SPDX-License-Identifier: Apache-2.0
// Block means, computed once for all queries of a call. blockIdx.x selects the task, and blockIdx.y
// the 64 columns to work on.
//
// fill_rows: some rows of the block-mean table.
//  1. Row r belongs to one sequence (pool/row_sequences.cuh).
//  2. Each half warp sums a group. Then a thread sums the groups of a block in one column and
//     writes the mean.
//
// fill_paged_rows: the same for paged keys.
//  1. The thread block counts the rows of all sequences (pool/paged_rows.cuh).
//  2. As step 2 above, for rows that cover 1024 keys, or a longer block, at a time. Where the cache
//     keeps sums of groups, fill_rows_from_sums in place of that.
//
// fill_partial_means: the partial block means of up to 64 queries.
//  1. Consecutive queries of one sequence and one partial block form a run if none sees fewer keys
//     than the one before it.
//  2. Each half warp sums a group, up to the keys of the run's last query; where the cache keeps
//     the sum of a whole group, it is read. In the groups where the keys of queries end, the sum
//     after every key is kept. This is done for two groups at a time, enough for 64 queries that
//     each see one key more than the one before.
//  3. A thread turns group sums into sums of all earlier groups.
//  4. Each half warp adds, for a query, the sum of its earlier groups and the sum in its last one,
//     and divides.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cuda/block_means.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "pool/generic.hpp"
#include "pool/generic_config.cuh"
#include "pool/paged_rows.cuh"
#include "pool/row_sequences.cuh"

namespace misa::cuda::pool {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

struct PoolShared : RowSequences {
  alignas(16) float sums[kGroups][kSumColumns];
  alignas(16) float running[kEndGroups][kGroup][kSumColumns];  // after every key of a group
  std::uint32_t largest[kGroups];                              // bits of a group's largest |scale|
  // Per query: its first key, the number of its whole blocks, and the number of keys after them.
  std::int32_t starts[kPartialQueries];
  std::int32_t whole_blocks[kPartialQueries];
  std::int32_t partial_keys[kPartialQueries];
  std::uint32_t run_begins[kPartialQueries / 32];
};

// Step 2 of both tasks. Each half warp sums one group: the `count` keys from `token` on, or none if
// `token` is -1. If `whole`, all groups have all their keys. Unless `running` is null, the sums
// after every key are stored there.
template <DType type, bool whole, class Source>
__device__ void sum_groups(PoolShared& shared, const Source& keys, std::int64_t token, int count,
                           int first_column, float (*running)[kSumColumns]) {
  const int half = static_cast<int>(threadIdx.x) / kSumLanes;
  const int column = static_cast<int>(threadIdx.x) % kSumLanes * kLaneColumns;
  if (!__any_sync(kFullMask, token >= 0)) {
    return;
  }
  const auto store = [&](float* row, const float(&sum)[kLaneColumns]) {
    *reinterpret_cast<float4*>(row + column) = make_float4(sum[0], sum[1], sum[2], sum[3]);
  };
  if constexpr (kPaged<Source> && !whole) {
    if (has_sums(keys)) {
      if (token >= 0 && count == kGroup && running == nullptr) {
        *reinterpret_cast<float4*>(&shared.sums[half][column]) =
            group_sum(keys, group_place(keys, token), first_column + column);
        token = -1;
      }
      if (!__any_sync(kFullMask, token >= 0)) {
        return;
      }
    }
  }
  const bool exists = whole || token >= 0;
  if constexpr (whole) {  // a half warp without a group sums the group of the other half
    const std::int64_t other = __shfl_xor_sync(kFullMask, token, kSumLanes);
    token = token >= 0 ? token : other;
  }
  const GroupSum group = sum_group<type, kKeysInFlight, whole>(
      keys, max(token, std::int64_t{0}), token >= 0 ? count : 0, first_column + column,
      [&](int i, const float(&sum)[kLaneColumns]) {
        if (running != nullptr) {
          store(running[i], sum);
        }
      });
  if (exists) {
    store(shared.sums[half], group.sum);
    if (column == 0) {
      shared.largest[half] = group.largest;
    }
  }
}

// Step 2 of fill_rows and fill_paged_rows, for the blocks whose first keys shared.tokens holds.
template <DType type, class Source>
__device__ void write_rows(PoolShared& shared, const Source& keys, const BlockMeanTable& means,
                           std::int64_t first_row, int first_column) {
  const std::int32_t groups = means.block / kGroup;
  const int rows = thread_block_rows(means.block);
  const int half = static_cast<int>(threadIdx.x) / kSumLanes;
  const int column = static_cast<int>(threadIdx.x) % kSumColumns;
  const int slot = groups < kGroups ? half / groups : 0;
  const std::int64_t begin = slot < rows ? shared.tokens[slot] : -1;

  float sum = 0;  // continued in the next iteration if a block has more than kGroups groups
  std::uint32_t largest = 0;
  for (std::int32_t first = 0; first < groups; first += kGroups) {
    const std::int32_t group = groups < kGroups ? half % groups : first + half;
    const bool exists = begin >= 0 && group < groups;
    sum_groups<type, true>(shared, keys, exists ? begin + std::int64_t{group} * kGroup : -1, kGroup,
                           first_column, nullptr);
    __syncthreads();
    const int count = min(kGroups, groups - first);
    for (int i = static_cast<int>(threadIdx.x) / kSumColumns; i < rows;
         i += kThreads / kSumColumns) {
      if (shared.tokens[i] < 0) {
        continue;
      }
#pragma unroll 8
      for (int j = i * groups; j < i * groups + count; ++j) {
        sum = __fadd_rn(sum, shared.sums[j][column]);
        largest = max(largest, shared.largest[j]);
      }
      if (first + count == groups && first_row + i < means.capacity) {
        const std::int64_t row = first_row + i;
        const float mean = sum / static_cast<float>(means.block);
        const int d = first_column + column;
        float scale = 1;
        if (means.fp16) {
          scale = fp16_scale(largest);
          store_mean<true>(mean, scale, d, means.dim,
                           means.rows + row * kMeanParts<true> * means.dim, means.dim);
        } else {
          store_mean<false>(mean, scale, d, means.dim,
                            means.rows + row * kMeanParts<false> * means.dim, means.dim);
        }
        if (d == 0) {
          means.factors[row] = 1 / scale;
        }
        sum = 0;
        largest = 0;
      }
    }
    __syncthreads();
  }
}

template <DType type>
__device__ void fill_rows(PoolShared& shared, const DeviceRaggedSource& keys, std::int64_t tokens,
                          const BlockMeanTable& means, std::int64_t first_row, int first_column) {
  find_row_sequences(shared, keys, tokens, means, first_row);
  write_rows<type>(shared, keys, means, first_row, first_column);
}

struct PagedPoolShared : PoolShared {
  RowCounts counts;
};

__device__ void fill_paged_rows(PagedPoolShared& shared, const DevicePagedSource& keys,
                                const PagedRows& rows, const BlockMeanTable& means,
                                std::int32_t thread_block, std::int32_t thread_blocks,
                                int first_column) {
  const int thread = static_cast<int>(threadIdx.x);
  const int at_once = thread_block_rows(means.block);
  for (std::int32_t first = thread_block * at_once; first < rows.count();
       first += thread_blocks * at_once) {
    if (thread < at_once) {
      const std::int32_t row = first + thread;
      shared.tokens[thread] = -1;
      if (row < rows.count()) {
        const auto [start, block] = rows.block_of(row);
        shared.tokens[thread] = start + std::int64_t{block} * means.block;
        means.starts[row] = start;
      }
    }
    __syncthreads();
    write_rows<DType::e4m3>(shared, keys, means, first, first_column);
  }
}

// fill_partial_means, step 4, for those of queries first … end - 1 whose keys end in one of
// `end_groups` groups from `end_group` on. shared.sums[0] belongs to group group0.
__device__ void write_partial_means(const PoolShared& shared, const BlockMeanTable& means,
                                    std::int64_t t0, int first, int end, std::int32_t group0,
                                    std::int32_t end_group, int end_groups, int first_column) {
  const int column = static_cast<int>(threadIdx.x) % kSumLanes * kLaneColumns;
  for (int i = first + static_cast<int>(threadIdx.x) / kSumLanes; i < end; i += kGroups) {
    const std::int32_t partial_keys = shared.partial_keys[i];
    const std::int32_t group = partial_keys / kGroup;
    if (partial_keys == 0 || group < end_group || group >= end_group + end_groups) {
      continue;
    }
    float4 sum = *reinterpret_cast<const float4*>(&shared.sums[group - group0][column]);
    if (const int rest = partial_keys % kGroup; rest > 0) {
      const float4 running =
          *reinterpret_cast<const float4*>(&shared.running[group - end_group][rest - 1][column]);
      sum = make_float4(__fadd_rn(sum.x, running.x), __fadd_rn(sum.y, running.y),
                        __fadd_rn(sum.z, running.z), __fadd_rn(sum.w, running.w));
    }
    const auto n = static_cast<float>(partial_keys);
    *reinterpret_cast<float4*>(means.partial + (t0 + i) * means.dim + first_column + column) =
        make_float4(sum.x / n, sum.y / n, sum.z / n, sum.w / n);
  }
}

// For queries t0 … t0 + queries - 1.
template <DType type, class Source>
__device__ void fill_partial_means(PoolShared& shared, const Source& keys, std::int64_t t0,
                                   int queries, const BlockMeanTable& means, int first_column) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < queries) {
    const Range range = visible(keys, t0 + thread);
    shared.starts[thread] = range.start;
    shared.whole_blocks[thread] = range.length / means.block;
    shared.partial_keys[thread] = range.length % means.block;
  }
  __syncthreads();
  if (thread < kPartialQueries) {  // step 1
    const bool begins =
        thread < queries && (thread == 0 || shared.starts[thread] != shared.starts[thread - 1] ||
                             shared.whole_blocks[thread] != shared.whole_blocks[thread - 1] ||
                             shared.partial_keys[thread] < shared.partial_keys[thread - 1]);
    const std::uint32_t mask = __ballot_sync(kFullMask, begins);
    if (thread % 32 == 0) {
      shared.run_begins[thread / 32] = mask;
    }
  }
  __syncthreads();
  const std::uint64_t begins = shared.run_begins[0] | std::uint64_t{shared.run_begins[1]} << 32;

  const int half = thread / kSumLanes;
  const int column = thread % kSumColumns;
  for (int first = 0, end = 0; first < queries; first = end) {
    const std::uint64_t later = first + 1 < kPartialQueries ? begins >> (first + 1) : 0;
    end = later == 0 ? queries : first + __ffsll(static_cast<long long>(later));
    const std::int64_t begin =
        shared.starts[first] + std::int64_t{shared.whole_blocks[first]} * means.block;
    const std::int32_t max_keys = shared.partial_keys[end - 1];
    if (max_keys == 0) {
      continue;
    }
    float total = 0;  // of the groups before group0
    for (std::int32_t group0 = 0; group0 <= max_keys / kGroup; group0 += kGroups) {
      const std::int32_t group = group0 + half;
      const std::int32_t last = min(group0 + kGroups - 1, max_keys / kGroup);
      std::int32_t end_group = max(group0, shared.partial_keys[first] / kGroup);
      float next_total = total;
      do {
        const int end_groups = min(kEndGroups, last + 1 - end_group);
        const int count = min(kGroup, max_keys - group * kGroup);
        const bool keep_running = group >= end_group && group < end_group + end_groups;
        sum_groups<type, false>(shared, keys, count > 0 ? begin + std::int64_t{group} * kGroup : -1,
                                count, first_column,
                                keep_running ? shared.running[group - end_group] : nullptr);
        __syncthreads();
        if (thread < kSumColumns) {  // step 3
          next_total = total;
          for (std::int32_t i = group0; i <= last; ++i) {
            const float sum = shared.sums[i - group0][column];
            shared.sums[i - group0][column] = next_total;
            next_total = __fadd_rn(next_total, sum);
          }
        }
        __syncthreads();
        write_partial_means(shared, means, t0, first, end, group0, end_group, end_groups,
                            first_column);
        __syncthreads();
        end_group += kEndGroups;
      } while (end_group <= last);
      total = next_total;
    }
  }
}

template <DType type, class Source>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<type>)
    block_means_kernel(const Source keys, std::int64_t tokens, const BlockMeanTable means,
                       std::int32_t partial_blocks, std::int32_t partial_queries) {
  begin_kernel();
  __shared__ std::conditional_t<kPaged<Source>, PagedPoolShared, PoolShared> shared;
  const auto thread_block = static_cast<std::int32_t>(blockIdx.x);
  const int first_column = static_cast<int>(blockIdx.y) * kSumColumns;
  if (thread_block < partial_blocks) {
    const std::int64_t t0 = std::int64_t{thread_block} * partial_queries;
    const auto queries =
        static_cast<int>(min(static_cast<std::int64_t>(partial_queries), tokens - t0));
    fill_partial_means<type>(shared, keys, t0, queries, means, first_column);
  } else {
    const std::int32_t block = thread_block - partial_blocks;
    if constexpr (kPaged<Source>) {
      const PagedRows rows(shared.counts, keys, tokens, means);
      const auto blocks = static_cast<std::int32_t>(gridDim.x) - partial_blocks;
      if (block == 0 && first_column == 0) {
        rows.write_bases();
      }
      if (has_sums(keys)) {
        constexpr std::int32_t kWarps = kThreads / 32;
        const auto columns = static_cast<std::int32_t>(gridDim.y);
        const std::int32_t first = block * columns + static_cast<std::int32_t>(blockIdx.y);
        fill_rows_from_sums(rows, keys, means,
                            first * kWarps + static_cast<std::int32_t>(threadIdx.x) / 32,
                            blocks * columns * kWarps);
      } else {
        fill_paged_rows(shared, keys, rows, means, block, blocks, first_column);
      }
    } else {
      fill_rows<type>(shared, keys, tokens, means,
                      std::int64_t{block} * thread_block_rows(means.block), first_column);
    }
  }
}

std::size_t partial_bytes(std::int64_t tokens, std::int64_t dim, bool partial) {
  return partial ? padded(static_cast<std::size_t>(tokens * dim) * sizeof(float)) : 0;
}

std::size_t bases_bytes(std::int64_t sequences) {
  return padded(static_cast<std::size_t>(sequences) * sizeof(std::int32_t));
}

std::size_t table_bytes(std::int64_t rows, std::int64_t dim) {
  const auto count = static_cast<std::size_t>(rows);
  return padded(count * sizeof(std::int32_t)) + padded(count * sizeof(float)) +
         padded(count * kMaxBf16Parts * static_cast<std::size_t>(dim) * sizeof(std::uint16_t));
}

// Queries whose partial block means a thread block computes: where sequences have few queries,
// those of one sequence, so that the thread block does not sum one sequence after the other.
std::int64_t partial_queries_of(const DeviceRaggedSource& /*keys*/, std::int64_t /*tokens*/) {
  return kPartialQueries;
}
std::int64_t partial_queries_of(const DevicePagedSource& keys, std::int64_t tokens) {
  const std::int64_t sequences = std::max(keys.sequences, 1);
  return std::clamp<std::int64_t>(tokens / sequences, 1, kPartialQueries);
}

// Thread blocks that fill rows, for each column block: of paged keys, as many as run at a time.
template <DType type>
std::int64_t row_blocks_of(const DeviceRaggedSource& /*keys*/, const BlockMeanTable& means,
                           std::int64_t /*others*/, int /*num_sms*/) {
  const std::int64_t rows = thread_block_rows(means.block);
  return (means.capacity + rows - 1) / rows;
}
template <DType type>
std::int64_t row_blocks_of(const DevicePagedSource& keys, const BlockMeanTable& means,
                           std::int64_t others, int num_sms) {
  const std::int64_t column_blocks = means.dim / kSumColumns;
  const std::int64_t at_a_time = std::int64_t{num_sms} * kBlocksPerSm<type> / column_blocks;
  if (means.capacity == 0) {
    return 0;
  }
  const std::int64_t rows = std::min<std::int64_t>(
      means.capacity, std::int64_t{keys.sequences} * (row_limit(keys) / means.block));
  const std::int64_t at_once = has_sums(keys) ? kThreads / 32 : thread_block_rows(means.block);
  // At least one, for the rows' bases.
  return std::clamp<std::int64_t>((rows + at_once - 1) / at_once, 1,
                                  std::max({at_a_time - others, at_a_time / 2, std::int64_t{1}}));
}

template <DType type, class Source>
void launch(const Source& keys, std::int64_t tokens, const BlockMeanTable& means, int num_sms,
            cudaStream_t stream) {
  const std::int64_t partial_queries = partial_queries_of(keys, tokens);
  const std::int64_t partial_blocks =
      means.partial == nullptr ? 0 : (tokens + partial_queries - 1) / partial_queries;
  const std::int64_t row_blocks = row_blocks_of<type>(keys, means, partial_blocks, num_sms);
  const dim3 grid(static_cast<unsigned>(partial_blocks + row_blocks),
                  static_cast<unsigned>(means.dim / kSumColumns));
  if (grid.x > 0) {
    launch_kernel("block means", block_means_kernel<type, Source>, grid, kThreads, 0, stream, keys,
                  tokens, means, static_cast<std::int32_t>(partial_blocks),
                  static_cast<std::int32_t>(partial_queries));
  }
}

}  // namespace

std::size_t workspace_bytes(const Shape& shape, const KeyBounds& keys, std::int32_t block,
                            bool partial) {
  const std::int64_t sequences = keys.paged ? keys.total >> sequence_bits(shape.max_keys) : 0;
  return partial_bytes(shape.tokens, shape.dim, partial) + bases_bytes(sequences) +
         std::min(table_bytes(keys.total / block, shape.dim), keys.table_bytes);
}

template <class Source>
BlockMeanTable launch(const ProblemOf<Source>& problem, std::int32_t block, bool partial,
                      std::span<std::byte> workspace, int num_sms, cudaStream_t stream) {
  const std::int64_t tokens = problem.q.tokens;
  const std::int64_t dim = problem.q.dim;
  const std::size_t partial_size = partial_bytes(tokens, dim, partial);
  std::size_t bases_size = 0;
  if constexpr (kPaged<Source>) {
    bases_size = bases_bytes(problem.k.sequences);
  }

  // As many rows as the workspace has room for, at most what sequences without overlap need.
  std::int64_t capacity = 0;
  std::int64_t high = index_bound(problem.k) / block;
  while (capacity < high) {
    const std::int64_t middle = high - (high - capacity) / 2;
    if (partial_size + bases_size + table_bytes(middle, dim) <= workspace.size()) {
      capacity = middle;
    } else {
      high = middle - 1;
    }
  }

  std::byte* next = workspace.data();
  const auto allocate = [&](std::size_t bytes) {
    std::byte* allocated = next;
    next += padded(bytes);
    return allocated;
  };
  const auto rows = static_cast<std::size_t>(capacity);
  BlockMeanTable means{};
  means.partial = partial ? reinterpret_cast<float*>(allocate(partial_size)) : nullptr;
  if constexpr (kPaged<Source>) {
    if (capacity > 0) {
      means.bases = reinterpret_cast<std::int32_t*>(allocate(bases_size));
      means.sequence_bits = problem.k.sequence_bits;
    }
  }
  means.starts = reinterpret_cast<std::int32_t*>(allocate(rows * sizeof(std::int32_t)));
  means.factors = reinterpret_cast<float*>(allocate(rows * sizeof(float)));
  means.rows = reinterpret_cast<std::uint16_t*>(next);
  means.capacity = static_cast<std::int32_t>(capacity);
  means.block = block;
  means.dim = static_cast<std::int32_t>(dim);
  means.fp16 = problem.q.dtype == DType::e4m3 && problem.k.dtype == DType::e4m3;
  if constexpr (kPaged<Source>) {
    launch<DType::e4m3>(problem.k, tokens, means, num_sms, stream);
  } else {
    switch (problem.k.dtype) {
      case DType::f32: launch<DType::f32>(problem.k, tokens, means, num_sms, stream); break;
      case DType::bf16: launch<DType::bf16>(problem.k, tokens, means, num_sms, stream); break;
      case DType::e4m3: launch<DType::e4m3>(problem.k, tokens, means, num_sms, stream); break;
    }
  }
  return means;
}

template BlockMeanTable launch(const Problem&, std::int32_t, bool, std::span<std::byte>, int,
                               cudaStream_t);
template BlockMeanTable launch(const PagedProblem&, std::int32_t, bool, std::span<std::byte>, int,
                               cudaStream_t);

}  // namespace misa::cuda::pool
