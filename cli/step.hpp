// SPDX-License-Identifier: Apache-2.0
// Runs or times one step of an indexer over tensors in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <variant>
#include <vector>

#include "buffer.hpp"
#include "core/recipe.hpp"
#include "misa/indexer.hpp"
#include "timing.hpp"

namespace misa::cli {

struct StepInputs {
  Queries q;
  Weights w;
  std::variant<RaggedKeys, PagedKeys> k;

  // n: how many keys query t sees, never negative.
  [[nodiscard]] std::int64_t visible(std::int64_t t) const;
  [[nodiscard]] Shape shape() const;
};

// The inputs of the same step with shorter contexts: a query sees at most the first `keys` keys.
// Owns the lengths and refers to the original inputs for the rest.
class Prefix {
 public:
  Prefix(const StepInputs& inputs, std::int64_t keys);
  Prefix(const Prefix&) = delete;
  Prefix& operator=(const Prefix&) = delete;
  [[nodiscard]] const StepInputs& inputs() const { return inputs_; }

 private:
  StepInputs inputs_;
  std::vector<std::int32_t> lengths_;
};

Selected select(const Context& context, const IndexerConfig& config, const StepInputs& inputs,
                Want want = {});

// The same positions, selected a part of the queries at a time. Calls after_each(n) after n more
// queries, so that whoever waits for many queries of long contexts sees how far they are.
std::vector<std::int32_t> select_in_parts(const Context& context, const IndexerConfig& config,
                                          const StepInputs& inputs,
                                          const std::function<void(std::int64_t)>& after_each);

// Steps to be timed against each other. Their plans are made once, as a server does, and they share
// memory for a workspace and for results.
class TimedSteps {
 public:
  explicit TimedSteps(const Context& context) : context_(context) {}
  TimedSteps(const TimedSteps&) = delete;
  TimedSteps& operator=(const TimedSteps&) = delete;

  // The inputs must live as long as this.
  void add(const IndexerConfig& config, const StepInputs& inputs);

  [[nodiscard]] std::size_t workspace_bytes(std::size_t i) const {
    return steps_[i].plan.workspace_bytes();
  }

  // One for each step, in the order in which they were added; for as long as this lives.
  [[nodiscard]] std::vector<Contender> contenders();

 private:
  struct Step {
    Plan plan;
    const StepInputs* inputs;
    std::int64_t indices;
  };

  const Context& context_;
  std::vector<Step> steps_;
  std::optional<Buffer> workspace_;
  std::vector<std::int32_t> indices_;
};

// The mean cost of the step's queries.
Cost mean_cost(const IndexerConfig& config, const StepInputs& inputs);

}  // namespace misa::cli
