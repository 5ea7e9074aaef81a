// SPDX-License-Identifier: Apache-2.0
// Runs or times one step of an indexer over tensors in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <variant>
#include <vector>

#include "core/recipe.hpp"
#include "metrics.hpp"
#include "misa/indexer.hpp"

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

struct StepTiming {
  Timing step;  // seconds for all queries
  std::size_t workspace_bytes;
};

// Times the step without the creation of its plan and memory, which a server does once.
StepTiming time_step(const Context& context, const IndexerConfig& config, const StepInputs& inputs,
                     int runs);

// The mean cost of the step's queries.
Cost mean_cost(const IndexerConfig& config, const StepInputs& inputs);

}  // namespace misa::cli
