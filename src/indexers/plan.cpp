// A plan: everything that depends on shapes alone, then runs that only check and compute.
#include <utility>

#include "dispatch/backend.hpp"
#include "indexers/validate.hpp"
#include "misa/indexer.hpp"
#include "workspace.hpp"

namespace misa {
namespace {

std::unique_ptr<const BackendPlan> plan_on(const Context& context, const IndexerConfig& config,
                                           const Shape& shape) {
  validate(config, shape);
  return context.state().backend.plan(config, shape, context.state());
}

// The inputs of a call, validated.
template <class Keys>
struct Inputs {
  Queries q;
  Weights w;
  Keys k;

  Inputs(const Queries& queries, const Weights& weights, const Keys& keys)
      : q(validated(queries)), w(validated(weights, q)), k(validated(keys, q)) {}
};

template <class Keys>
void run_on(const BackendPlan& plan, const IndexerConfig& config, const Inputs<Keys>& in,
            const Selection& out, std::span<std::byte> workspace) {
  validate(out, config, in.q);
  validate_workspace(workspace, plan.workspace_bytes());
  plan.run(Problem{config, in.q, in.w, in.k, out}, workspace);
}

template <class Keys>
Selected select_from(const Context& context, const IndexerConfig& config, const Inputs<Keys>& in,
                     Want want) {
  const auto plan = plan_on(context, config, shape_of(in.q, in.k));
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
  const OwnWorkspace workspace(plan->workspace_bytes());
  run_on(*plan, config, in, {selected.indices, selected.scores, selected.heads, selected.residual},
         workspace.span());
  return selected;
}

}  // namespace

struct Plan::State {
  State(Context on, IndexerConfig chosen, const Shape& bounds)
      : context(std::move(on)),
        config(std::move(chosen)),
        shape(bounds),
        plan(plan_on(context, config, shape)) {}

  template <class Keys>
  void run(const Inputs<Keys>& in, const Selection& out, std::span<std::byte> workspace) const {
    validate_planned(shape_of(in.q, in.k), shape);
    run_on(*plan, config, in, out, workspace);
  }

  Context context;
  IndexerConfig config;
  Shape shape;
  std::unique_ptr<const BackendPlan> plan;
};

Plan::Plan(Context context, IndexerConfig config, const Shape& shape)
    : state_(std::make_unique<State>(std::move(context), std::move(config), shape)) {}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

std::size_t Plan::workspace_bytes() const { return state_->plan->workspace_bytes(); }
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
