// SPDX-License-Identifier: Apache-2.0
#include "indexers/reference.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>

#include "core/recipe.hpp"
#include "filter/reference.hpp"
#include "indexers/backend.hpp"
#include "misa/error.hpp"
#include "pool/reference.hpp"
#include "route/reference.hpp"
#include "score/reference.hpp"
#include "select/reference.hpp"

namespace misa {
namespace reference {
namespace {

std::vector<std::int32_t> all_heads(const Row& row) {
  std::vector<std::int32_t> heads(static_cast<std::size_t>(row.heads));
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

// Positions, ascending, and their scores.
struct Ranked {
  std::vector<std::int64_t> positions;
  std::vector<double> scores;
};

// The k best of them.
Ranked best(const Ranked& all, std::int64_t k) {
  Ranked kept;
  for (const std::int64_t i : top_k(all.scores, k)) {
    kept.positions.push_back(all.positions[i]);
    kept.scores.push_back(all.scores[i]);
  }
  return kept;
}

// The blocks that the block filter keeps of at least one, by their means.
std::vector<std::int64_t> keep_blocks(const Row& row, const std::vector<std::vector<double>>& means,
                                      int filter_blocks) {
  std::vector<double> block_scores;
  for (const std::vector<double>& mean : means) {
    block_scores.push_back(score(row, mean, all_heads(row)));
  }
  std::vector<std::int64_t> best;
  if (block_scores.size() > 2) {
    const auto between = std::span(block_scores).subspan(1, block_scores.size() - 2);
    for (const std::int64_t i : top_k(between, filter_blocks - 2)) {
      best.push_back(1 + i);
    }
  }
  return kept_blocks(std::ssize(means), best);
}

// The block means of query t, whose row has those of whole blocks where it has keys.
std::vector<std::vector<double>> given_means(const Row& row, const MeansProblem& problem,
                                             std::int64_t t) {
  std::vector<std::vector<double>> means;
  for (std::int64_t b = 0; b < row.length; ++b) {
    means.emplace_back(row.key(b).begin(), row.key(b).end());
  }
  if (const float* partial = problem.partial_mean(t)) {
    means.emplace_back(partial, partial + row.dim);
  }
  return means;
}

// The positions that are scored: those of the kept blocks, or all.
std::vector<std::int64_t> filter(const Row& row, const IndexerConfig& config,
                                 const Recipe& recipe) {
  std::vector<std::int64_t> positions;
  if (!recipe.filtered) {
    positions.resize(static_cast<std::size_t>(row.length));
    std::iota(positions.begin(), positions.end(), 0);
    return positions;
  }
  const std::vector<std::vector<double>> means = block_means(row, config.filter_block);
  return positions_of_blocks(keep_blocks(row, means, config.filter_blocks), config.filter_block,
                             row.length);
}

// The residual row as it is used for the first scores; empty without one.
std::vector<double> scored_residual(const Routed& routed, const IndexerConfig& config,
                                    const Recipe& recipe, DType k_dtype) {
  if (!recipe.residual) {
    return {};
  }
  return recipe.sketched ? sketched_residual(routed.residual, config.sketch)
                         : rounded_residual(routed.residual, k_dtype);
}

Ranked select_row(const Problem& problem, std::int64_t t, const Row& row, const Recipe& recipe,
                  const Routed& routed) {
  const IndexerConfig& config = problem.config;
  const std::vector<std::int32_t> heads = recipe.active ? routed.heads : all_heads(row);
  const std::vector<double> residual = scored_residual(routed, config, recipe, problem.k_dtype());
  const Row first = recipe.sketched ? load_sketched_row(problem, t) : Row{};
  const Row& scored = recipe.sketched ? first : row;
  Ranked ranked;
  ranked.positions = filter(row, config, recipe);
  for (const std::int64_t position : ranked.positions) {
    ranked.scores.push_back(score(scored, scored.key(position), heads, residual));
  }
  if (recipe.reranked) {
    ranked = best(ranked, recipe.keep);
    for (std::size_t i = 0; i < ranked.positions.size(); ++i) {
      ranked.scores[i] = score(row, row.key(ranked.positions[i]), all_heads(row));
    }
  }
  return best(ranked, config.top_k);
}

}  // namespace

std::vector<double> head_values(const Row& row, const IndexerConfig& config) {
  switch (config.router) {
    case Router::pooled: return pooled_energy(row, block_means(row, config.block));
    case Router::nonlinearity: return nonlinearity(row);
    case Router::dispersion: return dispersion(row);
    case Router::self: return self_score(row);
    case Router::qnorm: return query_norm(row);
    case Router::weight: return weight_magnitude(row);
    case Router::all:
    case Router::fixed: break;
  }
  throw Error(ErrorCode::internal, "router: expected one that ranks heads");
}

Routed route(const Row& row, const IndexerConfig& config) {
  Routed routed;
  if (config.router == Router::all) {
    routed.heads = all_heads(row);
  } else if (config.router == Router::fixed) {
    routed.heads = config.static_heads;
    std::sort(routed.heads.begin(), routed.heads.end());
  } else {
    for (const std::int64_t j : top_k(head_values(row, config), config.heads)) {
      routed.heads.push_back(static_cast<std::int32_t>(j));
    }
  }
  if (config.residual) {
    routed.residual = residual_row(row, routed.heads);
  }
  return routed;
}

}  // namespace reference

namespace {

// Row t of an output of `width` columns; empty if the output is not wanted.
template <class T>
std::span<T> output_row(std::span<T> output, std::int64_t t, std::int64_t width,
                        std::int64_t stride) {
  return output.empty() ? output
                        : output.subspan(static_cast<std::size_t>(t * stride),
                                         static_cast<std::size_t>(width));
}

// Writes the values that fit a row of an output and pads the rest.
template <class T, class Values>
void write(std::span<T> row, const Values& values, T padding) {
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = i < values.size() ? static_cast<T>(values[i]) : padding;
  }
}

void run_row(const Problem& problem, std::int64_t t) {
  const IndexerConfig& config = problem.config;
  const reference::Row row = reference::load_row(problem, t);
  const Recipe recipe = recipe_of(config, row.heads, row.length);
  const reference::Routed routed =
      recipe.routed ? reference::route(row, config) : reference::Routed{};
  const reference::Ranked ranked = reference::select_row(problem, t, row, recipe, routed);
  const Selection& out = problem.out;
  write(output_row(out.indices, t, config.top_k, out.index_stride), ranked.positions, -1);
  write(output_row(out.scores, t, config.top_k, out.score_stride), ranked.scores,
        -std::numeric_limits<float>::infinity());
  write(output_row(out.heads, t, config.heads, config.heads), routed.heads, -1);
  write(output_row(out.residual, t, row.dim, row.dim), routed.residual, 0.0F);
}

// Uses neither cached page sums nor a workspace: each row is computed from its keys.
class ReferencePlan final : public BackendPlan {
 public:
  explicit ReferencePlan(const Threads& threads) : threads_(threads) {}

  [[nodiscard]] std::size_t workspace_bytes() const override { return 0; }

  void run(const Problem& problem, std::span<std::byte> /*workspace*/) const override {
    threads_.for_each(problem.q.tokens,
                      [&](std::int64_t t, int /*thread*/) { run_row(problem, t); });
  }

 private:
  const Threads& threads_;
};

class ReferenceBackend final : public Backend {
 public:
  [[nodiscard]] BackendInfo info() const override {
    return {"reference", "scalar fp64", "nothing", true, 0};
  }

  [[nodiscard]] std::unique_ptr<const BackendPlan> plan(
      const IndexerConfig& /*config*/, const Shape& /*shape*/,
      const Context::State& context) const override {
    return std::make_unique<ReferencePlan>(context.threads);
  }

  void route(const MeansProblem& problem, const Context::State& context) const override {
    context.threads.for_each(problem.problem.q.tokens, [&](std::int64_t t, int /*thread*/) {
      const reference::Row row = reference::load_row(problem.problem, t);
      const auto means = reference::given_means(row, problem, t);
      std::vector<std::int64_t> heads;
      if (!means.empty()) {
        heads = reference::top_k(reference::pooled_energy(row, means), problem.width);
      }
      write(problem.row(t), heads, -1);
    });
  }

  void keep_blocks(const MeansProblem& problem, const Context::State& context) const override {
    context.threads.for_each(problem.problem.q.tokens, [&](std::int64_t t, int /*thread*/) {
      const reference::Row row = reference::load_row(problem.problem, t);
      const auto means = reference::given_means(row, problem, t);
      std::vector<std::int64_t> kept;
      if (!means.empty()) {
        kept = reference::keep_blocks(row, means, static_cast<int>(problem.width));
      }
      write(problem.row(t), kept, -1);
    });
  }
};

}  // namespace

const Backend& reference_backend() {
  static const ReferenceBackend backend;
  return backend;
}

}  // namespace misa
