// SPDX-License-Identifier: Apache-2.0
// Block means, so that each key is read once for all queries that see it. Blocks of threads in y
// share the columns. In x there are two kinds.
//
// means_of_blocks: some rows of the table.
//  1. The sequence that a row belongs to: of the queries whose keys start at the row or before it,
//     those that start last, and of these the longest.
//  2. Half a warp sums a page; a thread sums a block's pages in a column and writes its mean.
//
// means_of_queries: the means that 64 queries have of the blocks they stand in.
//  1. A stretch are queries of one sequence and block, each seeing no less than the one before.
//  2. Half a warp sums a page up to the last query's. Where queries stand it keeps the sum after
//     every token: for two pages at a time, as many as 64 consecutive queries stand in.
//  3. A thread turns the pages' sums into sums of all pages before a page.
//  4. Half a warp a query adds the two and divides.
#include <cuda_runtime.h>

#include "cuda/block_means.cuh"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "pool/generic.hpp"
#include "pool/generic_config.cuh"

namespace misa::cuda::pool {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr int kPage = static_cast<int>(kPageSize);

constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Rows of the table that a block of threads fills.
__host__ __device__ constexpr int rows_of(std::int32_t block) {
  return block < kPages * kPage ? kPages * kPage / block : 1;
}

// A sequence as a number that is larger for one that starts later, or is longer; 0 is none.
using Sequence = unsigned long long;

__device__ Sequence sequence(Range range) {
  return (Sequence{static_cast<std::uint32_t>(range.start)} + 1) << 32 |
         static_cast<std::uint32_t>(range.length);
}

// The largest that a lane of the warp has.
__device__ Sequence largest_of_warp(Sequence own) {
  const auto high = static_cast<std::uint32_t>(own >> 32);
  const std::uint32_t most = __reduce_max_sync(kFullMask, high);
  const auto low = high == most ? static_cast<std::uint32_t>(own) : 0;
  return Sequence{most} << 32 | __reduce_max_sync(kFullMask, low);
}

struct Shared {
  alignas(16) float sums[kPages][kColumns];
  alignas(16) float running[kHosts][kPage][kColumns];  // after every token of a page
  std::uint32_t largest[kPages];                       // of the scales of a page
  Sequence before[kThreads / 32];  // the largest that a warp found before the second row
  Sequence owners[kPages];         // that start in a row behind the first
  std::int64_t tokens[kPages];     // where the block of a row begins; -1: there is none
  std::int32_t starts[kOwnQueries];
  std::int32_t blocks[kOwnQueries];     // whole ones
  std::int32_t positions[kOwnQueries];  // in the block where a query stands
  std::uint32_t begins[kOwnQueries / 32];
};

// Step 1 of blocks. The owner of a row is the largest sequence that starts there or before it. Few
// blocks of threads see one start behind their first row: they look at the queries once more.
__device__ void find_blocks(Shared& shared, const Keys& keys, std::int64_t tokens,
                            const BlockMeans& means, std::int64_t first_row) {
  constexpr int kInFlight = 8;
  const int rows = rows_of(means.block);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t second = (first_row + 1) * means.block;  // where the second row begins
  const std::int64_t end = (first_row + rows) * means.block;
  if (thread < kPages) {
    shared.owners[thread] = 0;
  }
  Sequence before = 0;
  bool inside = false;
  for (std::int64_t t0 = thread; t0 < tokens; t0 += kInFlight * kThreads) {
    Range range[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      range[i] = visible(keys, min(t0 + i * kThreads, tokens - 1));
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const bool first = range[i].start < second;
      before = first ? max(before, sequence(range[i])) : before;
      inside = inside || (!first && range[i].start < end);
    }
  }
  before = largest_of_warp(before);
  if (thread % 32 == 0) {
    shared.before[thread / 32] = before;
  }
  inside = __syncthreads_or(static_cast<int>(inside)) != 0;
  if (inside) {
    for (std::int64_t t = thread; t < tokens; t += kThreads) {
      const Range range = visible(keys, t);
      if (second <= range.start && range.start < end) {
        atomicMax(&shared.owners[range.start / means.block - first_row], sequence(range));
      }
    }
    __syncthreads();
  }
  if (thread < rows) {
    Sequence owner = 0;
#pragma unroll
    for (const Sequence of_warp : shared.before) {
      owner = max(owner, of_warp);
    }
    for (int i = 1; inside && i <= thread; ++i) {
      owner = max(owner, shared.owners[i]);
    }
    const auto start = static_cast<std::int32_t>((owner >> 32) - 1);  // -1: none
    const auto length = static_cast<std::int32_t>(owner & 0xFFFFFFFF);
    const std::int64_t block = first_row + thread - start / means.block;
    const bool exists = start >= 0 && block < length / means.block;
    shared.tokens[thread] = exists ? start + block * means.block : -1;
    if (first_row + thread < means.capacity) {
      means.starts[first_row + thread] = exists ? start : -1;
    }
  }
  __syncthreads();
}

// Sums the pages of which each half of a warp names one by its first token, or -1, and its count of
// keys, unless all are `whole`. With `running`, one a half, sums after every token are kept there.
template <DType type, bool whole>
__device__ void sum_pages(Shared& shared, const Keys& keys, const BlockMeans& means,
                          std::int64_t token, int count, int first_column,
                          float (*running)[kColumns]) {
  const int half = static_cast<int>(threadIdx.x) / kLanes;
  const int column = static_cast<int>(threadIdx.x) % kLanes * kLaneElements;
  if (!__any_sync(kFullMask, token >= 0)) {
    return;
  }
  const auto store = [&](float* row, const float(&sum)[kLaneElements]) {
    *reinterpret_cast<float4*>(row + column) = make_float4(sum[0], sum[1], sum[2], sum[3]);
  };
  if constexpr (whole) {  // a half without a page goes along with the other one
    const std::int64_t other = __shfl_xor_sync(kFullMask, token, kLanes);
    token = token >= 0 ? token : other;
  }
  const PageSum page = sum_page<type, kInFlight, whole>(
      keys, max(token, std::int64_t{0}), token >= 0 ? count : 0, first_column + column,
      [&](int i, const float(&sum)[kLaneElements]) {
        if (running != nullptr) {
          store(running[i], sum);
        }
      });
  store(shared.sums[half], page.sum);
  if (column == 0) {
    shared.largest[half] = page.largest;
  }
}

template <DType type>
__device__ void means_of_blocks(Shared& shared, const Keys& keys, std::int64_t tokens,
                                const BlockMeans& means, std::int64_t first_row, int first_column) {
  find_blocks(shared, keys, tokens, means, first_row);
  const std::int32_t pages = means.block / kPage;
  const int rows = rows_of(means.block);
  const int half = static_cast<int>(threadIdx.x) / kLanes;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int slot = pages < kPages ? half / pages : 0;
  const std::int64_t begin = slot < rows ? shared.tokens[slot] : -1;

  float sum = 0;  // carried on where a block has more pages than are summed at a time
  std::uint32_t largest = 0;
  for (std::int32_t first = 0; first < pages; first += kPages) {
    const std::int32_t page = pages < kPages ? half % pages : first + half;
    const bool exists = begin >= 0 && page < pages;
    sum_pages<type, true>(shared, keys, means, exists ? begin + std::int64_t{page} * kPage : -1,
                          kPage, first_column, nullptr);
    __syncthreads();
    const int count = min(kPages, pages - first);
    for (int i = static_cast<int>(threadIdx.x) / kColumns; i < rows; i += kThreads / kColumns) {
      if (shared.tokens[i] < 0) {
        continue;
      }
#pragma unroll 8
      for (int j = i * pages; j < i * pages + count; ++j) {
        sum = __fadd_rn(sum, shared.sums[j][column]);
        largest = max(largest, shared.largest[j]);
      }
      if (first + count == pages && first_row + i < means.capacity) {
        const std::int64_t row = first_row + i;
        const float mean = sum / static_cast<float>(means.block);
        const int d = first_column + column;
        float scale = 1;
        if (means.fp16) {
          scale = fp16_scale(largest);
          store_mean<true>(mean, scale, d, means.dim,
                           means.blocks + row * kMeanParts<true> * means.dim, means.dim);
        } else {
          store_mean<false>(mean, scale, d, means.dim,
                            means.blocks + row * kMeanParts<false> * means.dim, means.dim);
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

// Step 4 for those of queries first … end - 1 that stand in `hosts` pages from `host` on; the sums
// of pages start with page0's.
__device__ void write_means(const Shared& shared, const BlockMeans& means, std::int64_t t0,
                            int first, int end, std::int32_t page0, std::int32_t host, int hosts,
                            int first_column) {
  const int column = static_cast<int>(threadIdx.x) % kLanes * kLaneElements;
  for (int i = first + static_cast<int>(threadIdx.x) / kLanes; i < end; i += kPages) {
    const std::int32_t position = shared.positions[i];
    const std::int32_t page = position / kPage;
    if (position == 0 || page < host || page >= host + hosts) {
      continue;
    }
    float4 sum = *reinterpret_cast<const float4*>(&shared.sums[page - page0][column]);
    if (const int rest = position % kPage; rest > 0) {
      const float4 part =
          *reinterpret_cast<const float4*>(&shared.running[page - host][rest - 1][column]);
      sum = make_float4(__fadd_rn(sum.x, part.x), __fadd_rn(sum.y, part.y),
                        __fadd_rn(sum.z, part.z), __fadd_rn(sum.w, part.w));
    }
    const auto n = static_cast<float>(position);
    *reinterpret_cast<float4*>(means.own + (t0 + i) * means.dim + first_column + column) =
        make_float4(sum.x / n, sum.y / n, sum.z / n, sum.w / n);
  }
}

template <DType type>
__device__ void means_of_queries(Shared& shared, const Keys& keys, std::int64_t tokens,
                                 const BlockMeans& means, std::int64_t t0, int first_column) {
  const int thread = static_cast<int>(threadIdx.x);
  const int queries = static_cast<int>(min(std::int64_t{kOwnQueries}, tokens - t0));
  if (thread < queries) {
    const Range range = visible(keys, t0 + thread);
    shared.starts[thread] = range.start;
    shared.blocks[thread] = range.length / means.block;
    shared.positions[thread] = range.length % means.block;
  }
  __syncthreads();
  if (thread < kOwnQueries) {  // step 1
    const bool begins =
        thread < queries && (thread == 0 || shared.starts[thread] != shared.starts[thread - 1] ||
                             shared.blocks[thread] != shared.blocks[thread - 1] ||
                             shared.positions[thread] < shared.positions[thread - 1]);
    const std::uint32_t mask = __ballot_sync(kFullMask, begins);
    if (thread % 32 == 0) {
      shared.begins[thread / 32] = mask;
    }
  }
  __syncthreads();
  const std::uint64_t begins = shared.begins[0] | std::uint64_t{shared.begins[1]} << 32;

  const int half = thread / kLanes;
  const int column = thread % kColumns;
  for (int first = 0, end = 0; first < queries; first = end) {
    const std::uint64_t later = first + 1 < kOwnQueries ? begins >> (first + 1) : 0;
    end = later == 0 ? queries : first + __ffsll(static_cast<long long>(later));
    const std::int64_t begin =
        shared.starts[first] + std::int64_t{shared.blocks[first]} * means.block;
    const std::int32_t longest = shared.positions[end - 1];
    if (longest == 0) {
      continue;
    }
    float total = 0;  // of the pages before page0
    for (std::int32_t page0 = 0; page0 <= longest / kPage; page0 += kPages) {
      const std::int32_t page = page0 + half;
      const std::int32_t last = min(page0 + kPages - 1, longest / kPage);
      std::int32_t host = max(page0, shared.positions[first] / kPage);
      float next_total = total;
      do {
        const int hosts = min(kHosts, last + 1 - host);
        const int count = min(kPage, longest - page * kPage);
        const bool stands = page >= host && page < host + hosts;
        sum_pages<type, false>(shared, keys, means,
                               count > 0 ? begin + std::int64_t{page} * kPage : -1, count,
                               first_column, stands ? shared.running[page - host] : nullptr);
        __syncthreads();
        if (thread < kColumns) {
          next_total = total;
          for (std::int32_t i = page0; i <= last; ++i) {
            const float sum = shared.sums[i - page0][column];
            shared.sums[i - page0][column] = next_total;
            next_total = __fadd_rn(next_total, sum);
          }
        }
        __syncthreads();
        write_means(shared, means, t0, first, end, page0, host, hosts, first_column);
        __syncthreads();
        host += kHosts;
      } while (host <= last);
      total = next_total;
    }
  }
}

template <DType type>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<type>)
    means_kernel(const Keys keys, std::int64_t tokens, const BlockMeans means,
                 std::int32_t own_blocks) {
  begin_kernel();
  __shared__ Shared shared;
  const auto block = static_cast<std::int32_t>(blockIdx.x);
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  if (block < own_blocks) {
    means_of_queries<type>(shared, keys, tokens, means, std::int64_t{block} * kOwnQueries,
                           first_column);
  } else {
    means_of_blocks<type>(shared, keys, tokens, means,
                          std::int64_t{block - own_blocks} * rows_of(means.block), first_column);
  }
}

std::size_t own_bytes(std::int64_t tokens, std::int64_t dim, bool own) {
  return own ? padded(static_cast<std::size_t>(tokens * dim) * sizeof(float)) : 0;
}

std::size_t table_bytes(std::int64_t rows, std::int64_t dim) {
  const auto count = static_cast<std::size_t>(rows);
  return padded(count * sizeof(std::int32_t)) + padded(count * sizeof(float)) +
         padded(count * kMaxParts * static_cast<std::size_t>(dim) * sizeof(std::uint16_t));
}

template <DType type>
void launch(const Keys& keys, std::int64_t tokens, const BlockMeans& means, cudaStream_t stream) {
  const std::int64_t rows = rows_of(means.block);
  const std::int64_t own = means.own == nullptr ? 0 : (tokens + kOwnQueries - 1) / kOwnQueries;
  const dim3 grid(static_cast<unsigned>(own + (means.capacity + rows - 1) / rows),
                  static_cast<unsigned>(means.dim / kColumns));
  if (grid.x > 0) {
    launch_kernel("block means", means_kernel<type>, grid, kThreads, 0, stream, keys, tokens, means,
                  static_cast<std::int32_t>(own));
  }
}

}  // namespace

std::size_t workspace_bytes(const Shape& shape, std::int64_t total_keys, std::int32_t block,
                            bool own) {
  return own_bytes(shape.tokens, shape.dim, own) + table_bytes(total_keys / block, shape.dim);
}

BlockMeans launch(const Problem& problem, std::int32_t block, bool own,
                  std::span<std::byte> workspace, cudaStream_t stream) {
  const std::int64_t tokens = problem.q.tokens;
  const std::int64_t dim = problem.q.dim;
  const std::size_t own_size = own_bytes(tokens, dim, own);

  // The most rows, up to what keys without overlap need, that the workspace has room for.
  std::int64_t capacity = 0;
  std::int64_t high = problem.k.tokens / block;
  while (capacity < high) {
    const std::int64_t middle = high - (high - capacity) / 2;
    if (own_size + table_bytes(middle, dim) <= workspace.size()) {
      capacity = middle;
    } else {
      high = middle - 1;
    }
  }

  std::byte* next = workspace.data();
  const auto take = [&](std::size_t bytes) {
    std::byte* taken = next;
    next += padded(bytes);
    return taken;
  };
  const auto rows = static_cast<std::size_t>(capacity);
  BlockMeans means{};
  means.own = own ? reinterpret_cast<float*>(take(own_size)) : nullptr;
  means.starts = reinterpret_cast<std::int32_t*>(take(rows * sizeof(std::int32_t)));
  means.factors = reinterpret_cast<float*>(take(rows * sizeof(float)));
  means.blocks = reinterpret_cast<std::uint16_t*>(next);
  means.capacity = static_cast<std::int32_t>(capacity);
  means.block = block;
  means.dim = static_cast<std::int32_t>(dim);
  means.fp16 = problem.q.dtype == DType::e4m3 && problem.k.dtype == DType::e4m3;
  switch (problem.k.dtype) {
    case DType::f32: launch<DType::f32>(problem.k, tokens, means, stream); break;
    case DType::bf16: launch<DType::bf16>(problem.k, tokens, means, stream); break;
    case DType::e4m3: launch<DType::e4m3>(problem.k, tokens, means, stream); break;
  }
  return means;
}

}  // namespace misa::cuda::pool
