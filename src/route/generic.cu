// SPDX-License-Identifier: Apache-2.0
// Routing: the pooled router's heads from block means; other routers' heads and the residual row
// from sampled keys.
#include "core/recipe.hpp"
#include "route/generic.hpp"

#include "route/pooled.hpp"
#include "route/sampled.hpp"

namespace misa::cuda::route {

template <class Source>
void launch(const ProblemOf<Source>& problem, const IndexerConfig& config,
            const DeviceTraits& device, const BlockMeanTable* means, const Routing& out,
            cudaStream_t stream) {
  if (problem.q.tokens == 0) {
    return;
  }
  const bool pooled = traits_of(config.router).keys == RouterKeys::block_means;
  if (pooled) {
    launch_pooled(problem, device, *means, config.heads, out.heads, stream);
  }
  if (!pooled || config.residual) {
    launch_sampled(problem, config, device, out, stream);
  }
}

template void launch(const Problem&, const IndexerConfig&, const DeviceTraits&,
                     const BlockMeanTable*, const Routing&, cudaStream_t);
template void launch(const PagedProblem&, const IndexerConfig&, const DeviceTraits&,
                     const BlockMeanTable*, const Routing&, cudaStream_t);

}  // namespace misa::cuda::route
