// SPDX-License-Identifier: Apache-2.0
// Routing and the block filter from given block means.
#include "api/validate.hpp"
#include "core/means_problem.hpp"
#include "indexers/backend.hpp"
#include "misa/indexer.hpp"

namespace misa {
namespace {

MeansProblem problem_of(const IndexerConfig& config, const Queries& q, const Weights& w,
                        const RaggedMeans& means, std::span<std::int32_t> out, int width) {
  const RaggedKeys keys{means.data,       DType::f32, means.count,  means.dim,
                        means.row_stride, nullptr,    means.starts, means.ends};
  return {{config, q, w, RaggedSource{keys}, {}}, means.partial, out, width};
}

}  // namespace

void route_from_means(const Context& context, const Queries& queries, const Weights& weights,
                      const RaggedMeans& block_means, int heads, std::span<std::int32_t> out) {
  const Queries q = validated(queries);
  const Weights w = validated(weights, q);
  const RaggedMeans means = validated(block_means, q);
  validate_routed_heads(heads, out, q);
  IndexerConfig config;
  config.router = Router::pooled;
  config.heads = heads;
  context.state().backend.route(problem_of(config, q, w, means, out, heads), context.state());
}

void keep_blocks_from_means(const Context& context, const Queries& queries, const Weights& weights,
                            const RaggedMeans& block_means, int filter_blocks,
                            std::span<std::int32_t> out) {
  const Queries q = validated(queries);
  const Weights w = validated(weights, q);
  const RaggedMeans means = validated(block_means, q);
  validate_kept_blocks(filter_blocks, out, q);
  IndexerConfig config;
  config.filter_blocks = filter_blocks;
  context.state().backend.keep_blocks(problem_of(config, q, w, means, out, filter_blocks),
                                      context.state());
}

}  // namespace misa
