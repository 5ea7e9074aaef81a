// SPDX-License-Identifier: Apache-2.0
#include "score/columns.hpp"

#include <cuda_runtime.h>

#include "cuda/columns.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"
#include "score/row_lengths.cuh"

namespace misa::cuda::score {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpThreads = 32;

// One warp per query: its lanes take the entries of the list in turn.
template <class Source>
__global__ void row_lengths_kernel(Source keys, std::int64_t queries, Columns columns,
                                   RowLengths lengths) {
  begin_kernel();
  const std::int64_t t = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpThreads;
  const auto lane = static_cast<std::int32_t>(threadIdx.x % kWarpThreads);
  if (t >= queries) {
    return;
  }
  const std::int32_t n = visible(keys, t).length;
  std::int32_t length = n;
  if (columns.list != nullptr) {
    length = 0;
    for (std::int32_t i = lane; i < columns.width; i += kWarpThreads) {
      const std::int32_t first = position_of(columns, t, std::int64_t{i} * columns.block, n);
      length += first < 0 ? 0 : min(columns.block, n - first);
    }
    length = __reduce_add_sync(kFullMask, length);
  }
  if (lane == 0) {
    write_length(lengths, t, length);
  }
}

// One thread per entry.
template <class Source>
__global__ void positions_kernel(Source keys, std::int64_t entries, Columns columns,
                                 std::int32_t* selected, std::int32_t width, std::int64_t stride) {
  begin_kernel();
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= entries) {
    return;
  }
  const std::int64_t t = i / width;
  std::int32_t& entry = selected[t * stride + i % width];
  const std::int32_t column = entry;
  if (column >= 0 && column < std::int64_t{columns.width} * columns.block) {
    entry = position_of(columns, t, column, visible(keys, t).length);
  }
}

unsigned blocks_for(std::int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

}  // namespace

template <class Source>
void launch_row_lengths(const Source& keys, std::int64_t queries, const Columns& columns,
                        const RowLengths& lengths, void* stream) {
  launch_kernel("lengths", row_lengths_kernel<Source>, dim3(blocks_for(queries * kWarpThreads)),
                kThreads, 0, stream, keys, queries, columns, lengths);
}

template <class Source>
void launch_positions(const Source& keys, std::int64_t queries, const Columns& columns,
                      std::int32_t* selected, std::int32_t width, std::int64_t stride,
                      void* stream) {
  const std::int64_t entries = queries * width;
  launch_kernel("positions", positions_kernel<Source>, dim3(blocks_for(entries)), kThreads, 0,
                stream, keys, entries, columns, selected, width, stride);
}

template void launch_row_lengths(const DeviceRaggedSource&, std::int64_t, const Columns&,
                                 const RowLengths&, void*);
template void launch_row_lengths(const DevicePagedSource&, std::int64_t, const Columns&,
                                 const RowLengths&, void*);
template void launch_positions(const DeviceRaggedSource&, std::int64_t, const Columns&,
                               std::int32_t*, std::int32_t, std::int64_t, void*);
template void launch_positions(const DevicePagedSource&, std::int64_t, const Columns&,
                               std::int32_t*, std::int32_t, std::int64_t, void*);

}  // namespace misa::cuda::score
