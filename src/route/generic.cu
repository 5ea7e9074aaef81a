// SPDX-License-Identifier: Apache-2.0
// The data flow of routing: block means where the router asks for them, heads, residual row.
#include "pool/generic.hpp"
#include "route/generic.hpp"
#include "route/means.hpp"
#include "route/sampled.hpp"

namespace misa::cuda::route {

std::size_t workspace_bytes(const IndexerConfig& config, const Shape& shape,
                            std::int64_t total_keys) {
  return config.router == Router::pooled
             ? pool::workspace_bytes(shape, total_keys, config.block, true)
             : 0;
}

void launch(const Problem& problem, const IndexerConfig& config, const Device& device,
            const Routing& out, std::span<std::byte> workspace, cudaStream_t stream) {
  if (problem.q.tokens == 0) {
    return;
  }
  if (config.router == Router::pooled) {
    const pool::Means means = pool::launch(problem, config.block, true, workspace, stream);
    launch_pooled(problem, device, means, config.heads, out.heads, stream);
  }
  if (config.router != Router::pooled || config.residual) {
    launch_sampled(problem, config, device, out, stream);
  }
}

}  // namespace misa::cuda::route
