// SPDX-License-Identifier: Apache-2.0
#include "indexers/cuda_means.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "core/arena.hpp"
#include "filter/generic.hpp"
#include "misa/indexer.hpp"
#include "pool/given.hpp"
#include "route/pooled.hpp"

namespace misa::cuda {
namespace {

// The filter computes as many queries at a time as have this many bytes of block scores, but at
// least one query.
constexpr std::int64_t kScoreBytes = std::int64_t{64} << 20;

// The workspace of a call: the table, then the block scores of one chunk of queries of the filter.
struct MeansWorkspace {
  pool::GivenTable table{};
  Shape chunk;  // of queries, with the table's stand-in keys (GivenTable::keys)
  std::span<std::byte> scores;
  std::size_t bytes;

  MeansWorkspace(std::int64_t tokens, std::int64_t dim, std::int64_t count, std::byte* memory) {
    Arena arena(memory, kDeviceAlignment);
    table = pool::take_given_table(tokens, count, dim, arena);
    const std::int64_t row_bytes = (count + 1) * std::int64_t{sizeof(float)};
    chunk.tokens =
        std::clamp<std::int64_t>(kScoreBytes / row_bytes, 1, std::max<std::int64_t>(tokens, 1));
    chunk.max_keys = table.keys().tokens;
    scores = arena.take_span<std::byte>(
        static_cast<std::int64_t>(filter::workspace_bytes(filter_config(2), chunk)));
    bytes = arena.used();
  }

  static IndexerConfig filter_config(int filter_blocks) {
    IndexerConfig config;
    config.filter_block = pool::kGivenBlock;
    config.filter_blocks = filter_blocks;
    return config;
  }
};

MeansWorkspace filled(const MeansCall& call) {
  const MeansWorkspace workspace(call.q.tokens, call.q.dim, call.means.count, call.workspace);
  pool::launch_given(call.means, call.q.tokens, workspace.table,
                     static_cast<cudaStream_t>(call.stream));
  return workspace;
}

}  // namespace

std::size_t means_bytes(std::int64_t tokens, std::int64_t dim, std::int64_t count) {
  return MeansWorkspace(tokens, dim, count, nullptr).bytes;
}

void route_from_means(const MeansCall& call, int heads, std::int32_t* out) {
  if (call.q.tokens == 0 || heads == 0) {
    return;
  }
  const MeansWorkspace workspace = filled(call);
  route::launch_pooled(Problem{call.q, call.w, workspace.table.keys()}, call.device,
                       workspace.table.means, heads, out, static_cast<cudaStream_t>(call.stream));
}

void keep_blocks_from_means(const MeansCall& call, int filter_blocks, std::int32_t* out) {
  if (call.q.tokens == 0) {
    return;
  }
  const MeansWorkspace workspace = filled(call);
  for (std::int64_t first = 0; first < call.q.tokens; first += workspace.chunk.tokens) {
    const std::int64_t count = std::min(workspace.chunk.tokens, call.q.tokens - first);
    filter::launch(chunk_of(Problem{call.q, call.w, workspace.table.keys()}, first, count),
                   MeansWorkspace::filter_config(filter_blocks), call.device, workspace.table.means,
                   out + first * filter_blocks, workspace.scores,
                   static_cast<cudaStream_t>(call.stream));
  }
}

}  // namespace misa::cuda
