// SPDX-License-Identifier: Apache-2.0
#include "support/check.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <thread>

#include "core/recipe.hpp"
#include "misa/context.hpp"
#include "support/sketch.hpp"
#include "support/tolerance.hpp"

namespace misa::test {
namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

// What is wrong with a row; empty if it is right.
using Fault = std::optional<std::string>;

bool exact(const Interval& value) { return value.low == value.high; }

// Whether value a at index i outranks value b at index j in every backend.
bool outranks(const Interval& a, std::int64_t i, const Interval& b, std::int64_t j) {
  return a.low > b.high || (exact(a) && exact(b) && a.low == b.low && i < j);
}

// The members of a set that rounding may change; certain members are possible ones too.
struct Membership {
  std::vector<bool> certain;
  std::vector<bool> possible;

  explicit Membership(std::size_t size, bool member)
      : certain(size, member), possible(size, member) {}
};

// Which members of `universe` are among the k best.
Membership best_of(const std::vector<Interval>& values, const Membership& universe,
                   std::int64_t k) {
  const auto size = static_cast<std::int64_t>(values.size());
  Membership best(values.size(), false);
  for (std::int64_t i = 0; i < size; ++i) {
    if (!universe.possible[i]) {
      continue;
    }
    std::int64_t above = 0;      // certainly in the universe and certainly better
    std::int64_t not_below = 0;  // possibly in the universe and possibly better
    for (std::int64_t j = 0; j < size; ++j) {
      if (j == i) {
        continue;
      }
      above += universe.certain[j] && outranks(values[j], j, values[i], i) ? 1 : 0;
      not_below += universe.possible[j] && !outranks(values[i], i, values[j], j) ? 1 : 0;
    }
    best.possible[i] = above < k;
    best.certain[i] = universe.certain[i] && not_below < k;
  }
  return best;
}

// Whether `chosen` can be the best of `universe`.
Fault judge_choice(const char* what, const std::vector<Interval>& values,
                   const Membership& universe, std::span<const std::int64_t> chosen) {
  std::vector<bool> is_chosen(values.size());
  double lowest_chosen = std::numeric_limits<double>::infinity();
  for (const std::int64_t i : chosen) {
    is_chosen[i] = true;
    lowest_chosen = std::min(lowest_chosen, values[i].high);
    if (!universe.possible[i]) {
      return fmt::format("{} {} was ruled out by an earlier stage", what, i);
    }
  }
  for (std::int64_t j = 0; j < std::ssize(values); ++j) {
    // Only a value not below the lowest chosen value can outrank a chosen one.
    if (is_chosen[j] || !universe.certain[j] || values[j].low < lowest_chosen) {
      continue;
    }
    for (const std::int64_t i : chosen) {
      if (outranks(values[j], j, values[i], i)) {
        return fmt::format("{} {} in [{}, {}] was left out for {} in [{}, {}]", what, j,
                           values[j].low, values[j].high, i, values[i].low, values[i].high);
      }
    }
  }
  return {};
}

// The first `count` entries ascend inside [0, limit), and only padding follows.
template <class T>
Fault judge_indices(const char* what, std::span<const T> row, std::int64_t count,
                    std::int64_t limit) {
  for (std::int64_t i = 0; i < std::ssize(row); ++i) {
    const std::int64_t previous = i > 0 ? row[i - 1] : -1;
    const bool right = i < count ? row[i] > previous && row[i] < limit : row[i] == -1;
    if (!right) {
      return fmt::format("{}: expected {} ascending in [0, {}), then -1; entry {} is {} after {}",
                         what, count, limit, i, row[i], previous);
    }
  }
  return {};
}

Fault judge_heads(const IndexerConfig& config, const BoundedRow& row,
                  std::span<const std::int32_t> heads) {
  const std::int64_t total = row.row.heads;
  if (Fault fault = judge_indices("heads", heads, std::ssize(heads), total)) {
    return fault;
  }
  if (config.router == Router::fixed) {
    std::vector<std::int32_t> wanted = config.static_heads;
    std::sort(wanted.begin(), wanted.end());
    return std::equal(heads.begin(), heads.end(), wanted.begin(), wanted.end())
               ? Fault{}
               : fmt::format("heads: expected {}, got {}", wanted, heads);
  }
  return judge_choice("head", head_intervals(row, config),
                      Membership(static_cast<std::size_t>(total), true),
                      std::vector<std::int64_t>(heads.begin(), heads.end()));
}

Fault judge_residual(const BoundedRow& row, std::span<const std::int32_t> heads,
                     std::span<const float> residual) {
  const std::vector<Interval> wanted = residual_intervals(row, heads);
  for (std::size_t d = 0; d < residual.size(); ++d) {
    if (!wanted[d].contains(residual[d])) {
      return fmt::format("residual[{}]: expected [{}, {}], got {}", d, wanted[d].low,
                         wanted[d].high, residual[d]);
    }
  }
  return {};
}

// Positions that the block filter can have kept.
Membership filtered(const IndexerConfig& config, const BoundedRow& row) {
  const auto n = static_cast<std::size_t>(row.row.length);
  if (!recipe_of(config, row.row.heads, row.row.length).filtered) {
    return Membership(n, true);
  }
  const std::vector<Interval> blocks = block_intervals(row, config.filter_block);
  Membership between(blocks.size(), true);
  between.certain.front() = between.possible.front() = false;
  between.certain.back() = between.possible.back() = false;
  Membership kept = best_of(blocks, between, config.filter_blocks - 2);
  kept.certain.front() = kept.possible.front() = true;
  kept.certain.back() = kept.possible.back() = true;
  Membership positions(n, false);
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t block = i / static_cast<std::size_t>(config.filter_block);
    positions.certain[i] = kept.certain[block];
    positions.possible[i] = kept.possible[block];
  }
  return positions;
}

Fault judge_row(const Problem& problem, std::string_view backend, const Selected& result,
                std::int64_t t) {
  const std::int64_t n = problem.visible(t);
  const Recipe recipe = recipe_of(problem.config, problem.q.heads, n);
  const IndexerConfig config =
      recipe.dense ? IndexerConfig::dsa(problem.config.top_k) : problem.config;
  const BoundedRow row =
      bounded_row(problem, t, arithmetic_of(backend, config, problem.q, problem.k_dtype()));
  const auto row_of = [&](const auto& output, std::int64_t width) {
    return std::span(output).subspan(static_cast<std::size_t>(t * width),
                                     static_cast<std::size_t>(width));
  };
  const auto indices = row_of(result.indices, result.top_k);
  const auto scores = row_of(result.scores, result.top_k);
  const std::int64_t count = std::min<std::int64_t>(n, config.top_k);
  if (Fault fault = judge_indices("indices", indices, count, n)) {
    return fault;
  }
  for (std::int64_t i = count; i < config.top_k; ++i) {
    if (scores[i] != -std::numeric_limits<float>::infinity()) {
      return fmt::format("scores[{}]: expected -inf, got {}", i, scores[i]);
    }
  }
  const auto heads = result.heads.empty() ? std::span<const std::int32_t>{}
                                          : row_of(result.heads, problem.config.heads);
  const auto residual =
      result.residual.empty() ? std::span<const float>{} : row_of(result.residual, row.row.dim);
  if (recipe.dense) {
    const bool blank = std::all_of(heads.begin(), heads.end(), [](auto j) { return j == -1; }) &&
                       std::all_of(residual.begin(), residual.end(), [](auto x) { return x == 0; });
    if (!blank) {
      return "expected heads of -1 and a residual row of 0, for every head is taken";
    }
  }

  reference::Routed routed{{heads.begin(), heads.end()}, {residual.begin(), residual.end()}};
  if (config.router == Router::all) {
    routed = reference::route(row.row, config);
  } else if (Fault fault = judge_heads(config, row, heads)) {
    return fault;
  } else if (Fault linear = judge_residual(row, heads, residual)) {
    return linear;
  }

  Membership universe = filtered(config, row);
  std::vector<Interval> values;
  if (recipe.sketched) {
    reference::Routed rotated = routed;
    if (recipe.residual && config.sketch == 2) {
      rotated.residual = brute_force_rotated(routed.residual.data(), DType::f32, row.row.dim);
    }
    values = score_intervals(bounded_sketched_row(problem, t, row.arithmetic), config, rotated);
  } else {
    values = recipe.active ? score_intervals(row, config, routed) : all_head_intervals(row);
  }
  if (recipe.reranked) {
    universe = best_of(values, universe, recipe.keep);
    values = all_head_intervals(row);
  }
  const std::vector<std::int64_t> chosen(indices.begin(), indices.begin() + count);
  for (std::int64_t i = 0; i < count; ++i) {
    const Interval& wanted = values[chosen[i]];
    if (!wanted.contains(scores[i])) {
      return fmt::format("score of position {}: expected [{}, {}], got {}", chosen[i], wanted.low,
                         wanted.high, scores[i]);
    }
  }
  return judge_choice("position", values, universe, chosen);
}

// Calls task(0) … task(count - 1) on several threads: computing intervals takes longer than any
// backend takes.
template <class Task>
void each(std::int64_t count, const Task& task) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t i = next++; i < count; i = next++) {
      task(i);
    }
  };
  std::vector<std::jthread> others;
  const std::int64_t threads = std::min<std::int64_t>(std::thread::hardware_concurrency(), count);
  for (std::int64_t i = 1; i < threads; ++i) {
    others.emplace_back(work);
  }
  work();
}

template <class Keys>
AssertionResult judge(const IndexerConfig& config, const Queries& q, const Weights& w,
                      const Keys& keys, const Selected& result, std::string_view backend) {
  const bool routed = config.router != Router::all;
  const std::int64_t tokens = q.tokens;
  const auto size = [](const auto& output) { return std::ssize(output); };
  if (result.tokens != tokens || result.top_k != config.top_k ||
      size(result.indices) != tokens * config.top_k ||
      size(result.scores) != tokens * config.top_k ||
      size(result.heads) != (routed ? tokens * config.heads : 0) ||
      size(result.residual) != (config.residual ? tokens * q.dim : 0)) {
    return AssertionFailure() << "an output has the wrong size";
  }
  const Problem problem{config, q, w, source_of(keys), {}};
  std::vector<Fault> faults(static_cast<std::size_t>(tokens));
  each(tokens, [&](std::int64_t t) {
    if (const Fault fault = judge_row(problem, backend, result, t)) {
      faults[t] = fmt::format("row {} (n = {}): {}", t, problem.visible(t), *fault);
    }
  });
  const auto fault =
      std::find_if(faults.begin(), faults.end(), [](const Fault& f) { return f.has_value(); });
  return fault == faults.end() ? AssertionSuccess() : AssertionFailure() << **fault;
}

constexpr Want kEverything{true, true, true};

template <class T>
void append_to(std::vector<T>& whole, const std::vector<T>& part) {
  whole.insert(whole.end(), part.begin(), part.end());
}

// Some rows of an output of `tokens` rows.
template <class T>
std::vector<T> slice_of(const std::vector<T>& output, std::int64_t tokens, Rows rows) {
  const std::int64_t width = std::ssize(output) / std::max<std::int64_t>(1, tokens);
  return {output.begin() + rows.first * width, output.begin() + (rows.first + rows.count) * width};
}

// The first difference between two outputs; padding and NaN are compared by their bits.
template <class T>
Fault compare(const char* what, const std::vector<T>& a, const std::vector<T>& b,
              std::int64_t tokens) {
  if (a.size() != b.size()) {
    return fmt::format("{}: {} against {} entries", what, a.size(), b.size());
  }
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0) {
      const std::size_t width = a.size() / static_cast<std::size_t>(tokens);
      return fmt::format("{}[{}, {}]: {} against {}", what, i / width, i % width, a[i], b[i]);
    }
  }
  return {};
}

}  // namespace

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const BackendInfo& backend : backends()) {
    if (backend.available) {
      names.push_back(backend.name);
    }
  }
  return names;
}

Context context_for(const std::string& backend, int threads) {
  ContextOptions options;
  options.backend = backend;
  options.threads = threads;
  return Context(options);
}

Selected run(const Context& context, const IndexerConfig& config, const RaggedInputs& inputs,
             Rows rows) {
  return select(context, config, inputs.q(rows), inputs.w(rows), inputs.k(rows), kEverything);
}

Selected run(const Context& context, const IndexerConfig& config, const RaggedInputs& inputs) {
  return run(context, config, inputs, inputs.all());
}

Selected run(const Context& context, const IndexerConfig& config, const PagedInputs& inputs,
             Rows rows) {
  return select(context, config, inputs.q(rows), inputs.w(rows), inputs.k(rows), kEverything);
}

Selected run(const Context& context, const IndexerConfig& config, const PagedInputs& inputs) {
  return run(context, config, inputs, inputs.all());
}

void append_rows(Selected& whole, const Selected& part) {
  whole.tokens += part.tokens;
  whole.top_k = part.top_k;
  append_to(whole.indices, part.indices);
  append_to(whole.scores, part.scores);
  append_to(whole.heads, part.heads);
  append_to(whole.residual, part.residual);
}

Selected slice(const Selected& whole, Rows rows) {
  return {rows.count,
          whole.top_k,
          slice_of(whole.indices, whole.tokens, rows),
          slice_of(whole.scores, whole.tokens, rows),
          slice_of(whole.heads, whole.tokens, rows),
          slice_of(whole.residual, whole.tokens, rows)};
}

AssertionResult same_bits(const Selected& a, const Selected& b) {
  if (a.tokens != b.tokens || a.top_k != b.top_k) {
    return AssertionFailure() << "shapes differ";
  }
  for (const Fault& fault : {compare("heads", a.heads, b.heads, a.tokens),
                             compare("residual", a.residual, b.residual, a.tokens),
                             compare("indices", a.indices, b.indices, a.tokens),
                             compare("scores", a.scores, b.scores, a.tokens)}) {
    if (fault) {
      return AssertionFailure() << *fault;
    }
  }
  return AssertionSuccess();
}

AssertionResult valid(const IndexerConfig& config, const RaggedInputs& inputs,
                      const Selected& result, std::string_view backend) {
  const Rows all = inputs.all();
  return judge(config, inputs.q(all), inputs.w(all), inputs.k(all), result, backend);
}

AssertionResult valid(const IndexerConfig& config, const PagedInputs& inputs,
                      const Selected& result, std::string_view backend) {
  const Rows all = inputs.all();
  return judge(config, inputs.q(all), inputs.w(all), inputs.k(all), result, backend);
}

}  // namespace misa::test
