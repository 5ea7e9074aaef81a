// SPDX-License-Identifier: Apache-2.0
// A plan computes what depends on shapes alone; its runs then only check and compute.
#include <algorithm>
#include <numeric>
#include <utility>

#include "api/validate.hpp"
#include "core/recipe.hpp"
#include "core/workspace.hpp"
#include "indexers/backend.hpp"
#include "misa/indexer.hpp"

namespace misa {
namespace {

IndexerConfig validated(const IndexerConfig& config, const Shape& shape) {
  validate(config, shape);
  return config;
}

// A backend's plan for the effective configuration, which skips stages that change nothing.
struct Planned {
  IndexerConfig effective;
  std::unique_ptr<const BackendPlan> plan;

  Planned(const Context& context, const IndexerConfig& config, const Shape& shape)
      : effective(effective_config(validated(config, shape), shape.heads)),
        plan(context.state().backend.plan(effective, shape, context.state())) {}
};

// The inputs of a call, validated.
template <class Keys>
struct Inputs {
  Queries q;
  Weights w;
  Keys k;

  Inputs(const Queries& queries, const Weights& weights, const Keys& keys)
      : q(validated(queries)), w(validated(weights, q)), k(validated(keys, q)) {}
};

// Writes the heads and the residual row if every head is routed: all heads, and zeros, because the
// residual row replaces no head.
void report_every_head(const Problem& problem, const IndexerConfig& config, const Selection& out) {
  std::ranges::fill(out.residual, 0.0F);
  for (std::int64_t t = 0; !out.heads.empty() && t < problem.q.tokens; ++t) {
    const std::span row = out.heads.subspan(t * config.heads, config.heads);
    if (config.takes_every_head(config.heads, problem.visible(t))) {
      std::ranges::fill(row, -1);
    } else {
      std::iota(row.begin(), row.end(), 0);
    }
  }
}

// Puts slots of the cache, or positions with offsets, in place of the positions of a selection.
void convert_indices(const Problem& problem) {
  const Selection& out = problem.out;
  if (out.indices.empty() || (!out.slots && out.offsets.empty())) {
    return;
  }
  for (std::int64_t t = 0; t < problem.q.tokens; ++t) {
    for (std::int32_t& index : out.indices.subspan(t * out.index_stride, problem.config.top_k)) {
      if (index >= 0) {
        index =
            static_cast<std::int32_t>(out.slots ? std::get<PagedSource>(problem.keys).slot(t, index)
                                                : static_cast<std::uint32_t>(index) +
                                                      static_cast<std::uint32_t>(out.offsets[t]));
      }
    }
  }
}

template <class Keys>
void run_on(const Planned& planned, const IndexerConfig& config, const Inputs<Keys>& in,
            const Selection& out, std::span<std::byte> workspace) {
  const Selection resolved = validated(out, config, in.q, cache_of(in.k));
  validate_workspace(workspace, planned.plan->workspace_bytes());
  Problem problem{planned.effective, in.q, in.w, source_of(in.k), resolved};
  if (routes_every_head(config, in.q.heads)) {
    problem.out.heads = {};
    problem.out.residual = {};
    report_every_head(problem, config, out);
  }
  planned.plan->run(problem, workspace);
  convert_indices(problem);
}

template <class Keys>
Selected select_from(const Context& context, const IndexerConfig& config, const Inputs<Keys>& in,
                     Want want) {
  const Planned planned(context, config, shape_of(in.q, in.k));
  const auto rows = static_cast<std::size_t>(in.q.tokens);
  const auto top_k = static_cast<std::size_t>(config.top_k);
  Selected selected;
  selected.tokens = in.q.tokens;
  selected.top_k = config.top_k;
  selected.indices.resize(rows * top_k);
  if (want.scores) {
    selected.scores.resize(rows * top_k);
  }
  if (want.heads && config.router != Router::all) {
    selected.heads.resize(rows * static_cast<std::size_t>(config.heads));
  }
  if (want.residual && config.residual) {
    selected.residual.resize(rows * static_cast<std::size_t>(in.q.dim));
  }
  const OwnWorkspace workspace(planned.plan->workspace_bytes());
  run_on(planned, config, in,
         {selected.indices, selected.scores, selected.heads, selected.residual}, workspace.span());
  return selected;
}

}  // namespace

struct Plan::State {
  State(Context on, IndexerConfig chosen, const Shape& bounds)
      : context(std::move(on)),
        config(std::move(chosen)),
        shape(bounds),
        planned(context, config, shape) {}

  template <class Keys>
  void run(const Inputs<Keys>& in, const Selection& out, std::span<std::byte> workspace) const {
    validate_planned(shape_of(in.q, in.k), shape);
    run_on(planned, config, in, out, workspace);
  }

  Context context;
  IndexerConfig config;
  Shape shape;
  Planned planned;
};

Plan::Plan(Context context, IndexerConfig config, const Shape& shape)
    : state_(std::make_unique<State>(std::move(context), std::move(config), shape)) {}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

std::size_t Plan::workspace_bytes() const { return state_->planned.plan->workspace_bytes(); }
const IndexerConfig& Plan::config() const { return state_->config; }
const Shape& Plan::shape() const { return state_->shape; }

void Plan::run(const Queries& q, const Weights& w, const RaggedKeys& k, const Selection& out,
               std::span<std::byte> workspace) const {
  state_->run(Inputs(q, w, k), out, workspace);
}

void Plan::run(const Queries& q, const Weights& w, const PagedKeys& k, const Selection& out,
               std::span<std::byte> workspace) const {
  state_->run(Inputs(q, w, k), out, workspace);
}

Selected select(const Context& context, const IndexerConfig& config, const Queries& q,
                const Weights& w, const RaggedKeys& k, Want want) {
  return select_from(context, config, Inputs(q, w, k), want);
}

Selected select(const Context& context, const IndexerConfig& config, const Queries& q,
                const Weights& w, const PagedKeys& k, Want want) {
  return select_from(context, config, Inputs(q, w, k), want);
}

}  // namespace misa
