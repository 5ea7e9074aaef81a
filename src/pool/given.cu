// SPDX-License-Identifier: Apache-2.0
// A block-mean table of given means. A thread stores one element: of a row of the table, or of a
// query's partial block mean.
#include <cuda_runtime.h>

#include "cuda/block_means.cuh"
#include "cuda/launch.cuh"
#include "pool/given.hpp"

namespace misa::cuda::pool {
namespace {

constexpr int kThreads = 128;  // the elements of one row (D = 128) or two (D = 64)

struct GivenArguments {
  const float* data;  // [count, D]
  std::int64_t count;
  std::int64_t stride;
  std::int64_t tokens;
  const std::int32_t* starts;   // [T]
  const std::int32_t* ends;     // [T]
  const std::int32_t* partial;  // [T] or null
  BlockMeanTable means;
  std::int32_t* key_starts;  // [T]
  std::int32_t* key_ends;    // [T]
};

__global__ void __launch_bounds__(kThreads) given_kernel(const GivenArguments arguments) {
  begin_kernel();
  const BlockMeanTable& means = arguments.means;
  const int d = static_cast<int>(threadIdx.x) % means.dim;
  const std::int64_t row =
      std::int64_t{blockIdx.x} * (kThreads / means.dim) + static_cast<int>(threadIdx.x) / means.dim;
  if (row < arguments.count) {
    store_mean<false>(arguments.data[row * arguments.stride + d], 1, d, means.dim,
                      means.rows + row * kMeanParts<false> * means.dim, means.dim);
    if (d == 0) {
      means.factors[row] = 1;
    }
    return;
  }
  const std::int64_t t = row - arguments.count;
  if (t >= arguments.tokens) {
    return;
  }
  const auto count = static_cast<std::int32_t>(arguments.count);
  const std::int32_t partial = arguments.partial == nullptr ? -1 : arguments.partial[t];
  const bool in_part = partial >= 0 && partial < count;
  if (in_part) {
    means.partial[t * means.dim + d] = arguments.data[partial * arguments.stride + d];
  }
  if (d == 0) {
    const std::int32_t start = min(max(arguments.starts[t], 0), count);
    const std::int32_t end = min(max(arguments.ends[t], start), count);
    arguments.key_starts[t] = kGivenBlock * start;
    arguments.key_ends[t] = kGivenBlock * end + (in_part ? 1 : 0);
  }
}

}  // namespace

DeviceRaggedSource GivenTable::keys() const {
  const std::int64_t count = kGivenBlock * std::int64_t{means.capacity} + 1;
  DeviceRaggedSource keys{};
  keys.dtype = DType::f32;  // the means are in three bf16 parts, as those of f32 keys
  keys.tokens = count;
  keys.starts = starts;
  keys.ends = ends;
  keys.max_keys = static_cast<std::int32_t>(count);
  return keys;
}

GivenTable take_given_table(std::int64_t tokens, std::int64_t count, std::int64_t dim,
                            Arena& arena) {
  GivenTable table{};
  table.means.factors = arena.take<float>(count);
  table.means.rows = arena.take<std::uint16_t>(count * kMeanParts<false> * dim);
  table.means.partial = arena.take<float>(tokens * dim);
  table.starts = arena.take<std::int32_t>(tokens);
  table.ends = arena.take<std::int32_t>(tokens);
  table.means.capacity = static_cast<std::int32_t>(count);
  table.means.block = kGivenBlock;
  table.means.dim = static_cast<std::int32_t>(dim);
  return table;
}

void launch_given(const RaggedMeans& means, std::int64_t tokens, const GivenTable& table,
                  cudaStream_t stream) {
  const std::int64_t rows = kThreads / table.means.dim;
  const auto grid = static_cast<unsigned>((means.count + tokens + rows - 1) / rows);
  launch_kernel("given block means", given_kernel, dim3(grid), kThreads, 0, stream,
                GivenArguments{means.data, means.count, means.row_stride, tokens,
                               means.starts.data(), means.ends.data(), means.partial.data(),
                               table.means, table.starts, table.ends});
}

}  // namespace misa::cuda::pool
