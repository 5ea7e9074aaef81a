// Page sums and block means, so that each key is read once for all queries that see it.
//
// runs_kernel, one block:
//  1. A query begins a run if its keys start elsewhere than those of the query before it. An
//     inclusive count of beginnings numbers the runs.
//  2. A run has the whole pages of its longest query.
//  3. Exclusive sums of pages and of whole blocks give each run its rows of the tables. Rows
//  ascend,
//     so the runs that fit are those before the first that does not.
//
// pages_kernel and blocks_kernel, a warp a row of the table: the row's run by bisection, then the
// sum of a page, or the mean of a block as parts for the tensor cores.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "cuda/check.cuh"
#include "cuda/range.cuh"
#include "device/alignment.hpp"
#include "pool/generic.hpp"
#include "pool/generic_config.cuh"
#include "pool/means.cuh"

namespace misa::cuda::pool {
namespace {

constexpr unsigned kWarp = 0xFFFFFFFFU;
constexpr std::size_t kAlignment = 64;

constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

__global__ void __launch_bounds__(kRunThreads)
    runs_kernel(const Keys keys, std::int64_t tokens, const Means means) {
  __shared__ Scan::TempStorage scan;
  const auto thread = static_cast<std::int64_t>(threadIdx.x);

  std::int64_t count = 0;
  for (std::int64_t first = 0; first < tokens; first += kRunThreads) {  // step 1
    const std::int64_t t = first + thread;
    std::int32_t start = 0;
    bool begins = false;
    if (t < tokens) {
      start = visible(keys, t).start;
      begins = t == 0 || start != visible(keys, t - 1).start;
    }
    std::int64_t rank = 0;
    std::int64_t total = 0;
    Scan(scan).InclusiveSum(begins ? 1 : 0, rank, total);
    __syncthreads();
    if (t < tokens) {
      means.run_of[t] = static_cast<std::int32_t>(count + rank - 1);
    }
    if (begins) {
      means.runs[count + rank - 1] = {start, 0, 0, 0};
    }
    count += total;
  }
  __syncthreads();

  for (std::int64_t t = thread; t - thread < tokens; t += kRunThreads) {  // step 2
    const std::int32_t run = means.run_of[min(t, tokens - 1)];
    const std::int32_t pages = visible(keys, min(t, tokens - 1)).length / kPageSize;
    // A warp inside one run, the usual one, speaks with one voice.
    const bool together = __all_sync(kWarp, run == __shfl_sync(kWarp, run, 0));
    const std::int32_t most = __reduce_max_sync(kWarp, pages);
    if (!together) {
      atomicMax(&means.runs[run].pages, pages);
    } else if (threadIdx.x % 32 == 0) {
      atomicMax(&means.runs[run].pages, most);
    }
  }
  __syncthreads();

  std::int64_t page_row = 0;
  std::int64_t block_row = 0;
  for (std::int64_t first = 0; first < count; first += kRunThreads) {  // step 3
    const std::int64_t r = first + thread;
    const std::int64_t pages = r < count ? atomicAdd(&means.runs[r].pages, 0) : 0;
    std::int64_t pages_before = 0;
    std::int64_t pages_total = 0;
    Scan(scan).ExclusiveSum(pages, pages_before, pages_total);
    __syncthreads();
    std::int64_t blocks_before = 0;
    std::int64_t blocks_total = 0;
    Scan(scan).ExclusiveSum(pages / means.block_pages, blocks_before, blocks_total);
    __syncthreads();
    if (r < count) {
      const std::int64_t capacity = means.capacity;
      means.runs[r].page_row = static_cast<std::int32_t>(min(page_row + pages_before, capacity));
      means.runs[r].block_row = static_cast<std::int32_t>(min(block_row + blocks_before, capacity));
    }
    page_row += pages_total;
    block_row += blocks_total;
  }
  if (threadIdx.x == 0) {
    means.counts[0] = static_cast<std::int32_t>(count);
  }
}

// The last run whose rows begin at `row` or before it.
template <class First>
__device__ Run run_at(const Means& means, std::int32_t row, const First& first) {
  std::int32_t low = 0;
  std::int32_t high = means.counts[0];
  while (high - low > 1) {
    const std::int32_t middle = low + (high - low) / 2;
    (first(means.runs[middle]) <= row ? low : high) = middle;
  }
  return means.runs[low];
}

__global__ void __launch_bounds__(kThreads) pages_kernel(const Keys keys, const Means means) {
  const auto row = static_cast<std::int32_t>(blockIdx.x * kWarps + threadIdx.x / 32);
  const int d = static_cast<int>(threadIdx.x % 32) * kLaneElements;
  if (row >= means.capacity || d >= means.dim) {
    return;
  }
  const Run run = run_at(means, row, [](const Run& r) { return r.page_row; });
  const std::int32_t page = row - run.page_row;
  if (page >= run.pages || !in_tables(means, run)) {
    return;
  }
  with_dtype(keys.dtype, [&]<DType type>() {
    float sum[kLaneElements];
    sum_keys<type>(keys, means.aligned, run.start + std::int64_t{page} * kPageSize, kPageSize, d,
                   sum);
    *reinterpret_cast<float4*>(means.page_sums + std::int64_t{row} * means.dim + d) =
        make_float4(sum[0], sum[1], sum[2], sum[3]);
  });
}

__global__ void __launch_bounds__(kThreads) blocks_kernel(const Keys keys, const Means means) {
  const auto row = static_cast<std::int32_t>(blockIdx.x * kWarps + threadIdx.x / 32);
  const int d = static_cast<int>(threadIdx.x % 32) * kLaneElements;
  if (row >= means.capacity / means.block_pages || d >= means.dim) {
    return;
  }
  const Run run = run_at(means, row, [](const Run& r) { return r.block_row; });
  const std::int32_t block = row - run.block_row;
  if (block >= run.pages / means.block_pages || !in_tables(means, run)) {
    return;
  }
  const std::int32_t positions = means.block_pages * kPageSize;
  float mean[kLaneElements];
  mean_of(keys, means, run, block * positions, (block + 1) * positions, d, mean);
  store_mean(mean, d, means.dim, means.blocks + std::int64_t{row} * kMaxParts * means.dim,
             means.dim);
}

std::size_t fixed_bytes(std::int64_t tokens) {
  const auto queries = static_cast<std::size_t>(tokens);
  return padded(queries * sizeof(Run)) + padded(queries * sizeof(std::int32_t)) +
         padded(sizeof(std::int32_t));
}

std::size_t page_bytes(std::int64_t dim) { return static_cast<std::size_t>(dim) * sizeof(float); }

std::size_t block_bytes(std::int64_t dim) {
  return static_cast<std::size_t>(dim) * kMaxParts * sizeof(std::uint16_t);
}

// Pages of sequences that do not overlap; rows are counted in 32 bits.
std::int64_t wanted_capacity(std::int64_t total_keys) {
  return std::min<std::int64_t>(total_keys / kPageSize,
                                std::numeric_limits<std::int32_t>::max() / 2);
}

}  // namespace

std::size_t workspace_bytes(std::int64_t tokens, std::int64_t total_keys, std::int64_t dim,
                            std::int32_t block) {
  const auto pages = static_cast<std::size_t>(wanted_capacity(total_keys));
  const auto blocks = pages / static_cast<std::size_t>(block / kPageSize);
  return fixed_bytes(tokens) + padded(pages * page_bytes(dim)) + padded(blocks * block_bytes(dim));
}

Means launch(const Problem& problem, std::int32_t block, std::span<std::byte> workspace,
             cudaStream_t stream) {
  const std::int64_t tokens = problem.q.tokens;
  const std::int64_t dim = problem.q.dim;
  Means means{};
  means.block_pages = block / kPageSize;
  means.dim = static_cast<std::int32_t>(dim);
  means.aligned = is_aligned(problem.k);

  // The largest capacity, up to what is wanted, that the workspace has room for.
  std::int64_t low = 0;
  std::int64_t high = wanted_capacity(problem.k.tokens);
  while (low < high) {
    const std::int64_t middle = high - (high - low) / 2;
    if (workspace_bytes(tokens, middle * kPageSize, dim, block) <= workspace.size()) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  means.capacity = static_cast<std::int32_t>(low);

  const auto queries = static_cast<std::size_t>(tokens);
  std::byte* next = workspace.data();
  const auto take = [&](std::size_t bytes) {
    std::byte* taken = next;
    next += padded(bytes);
    return taken;
  };
  means.runs = reinterpret_cast<Run*>(take(queries * sizeof(Run)));
  means.run_of = reinterpret_cast<std::int32_t*>(take(queries * sizeof(std::int32_t)));
  means.counts = reinterpret_cast<std::int32_t*>(take(sizeof(std::int32_t)));
  means.page_sums = reinterpret_cast<float*>(take(static_cast<std::size_t>(low) * page_bytes(dim)));
  means.blocks = reinterpret_cast<std::uint16_t*>(next);

  runs_kernel<<<1, kRunThreads, 0, stream>>>(problem.k, tokens, means);
  check(cudaGetLastError(), "runs_kernel");
  const auto grid = [](std::int64_t rows) {
    return static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  };
  if (low > 0) {
    pages_kernel<<<grid(low), kThreads, 0, stream>>>(problem.k, means);
    check(cudaGetLastError(), "pages_kernel");
  }
  if (low >= means.block_pages) {
    blocks_kernel<<<grid(low / means.block_pages), kThreads, 0, stream>>>(problem.k, means);
    check(cudaGetLastError(), "blocks_kernel");
  }
  return means;
}

}  // namespace misa::cuda::pool
