// SPDX-License-Identifier: Apache-2.0
// One step of an indexer over the tensors of a file or of memory: run, or timed.
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

// The same step over prefixes: a query sees at most the first `keys` of its context. Owns what
// differs and refers to the inputs for the rest.
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

// Times the step with its plan and memory made beforehand, as a server would run it.
StepTiming time_step(const Context& context, const IndexerConfig& config, const StepInputs& inputs,
                     int runs);

// What the step's queries cost on average.
Cost mean_cost(const IndexerConfig& config, const StepInputs& inputs);

}  // namespace misa::cli
