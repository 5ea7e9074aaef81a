// SPDX-License-Identifier: Apache-2.0
#include "step.hpp"

#include <algorithm>

#include "buffer.hpp"

namespace misa::cli {

std::int64_t StepInputs::visible(std::int64_t t) const {
  std::int64_t n = 0;
  if (const auto* ragged = std::get_if<RaggedKeys>(&k)) {
    n = std::int64_t{ragged->ends[t]} - ragged->starts[t];
  } else {
    const auto& paged = std::get<PagedKeys>(k);
    n = paged.context_lens[t / paged.next_n] - paged.next_n + 1 + t % paged.next_n;
  }
  return std::max<std::int64_t>(0, n);
}

Shape StepInputs::shape() const {
  const auto* ragged = std::get_if<RaggedKeys>(&k);
  Shape shape{q.tokens, q.heads, q.dim,
              0,        q.dtype, ragged != nullptr ? ragged->dtype : DType::e4m3};
  for (std::int64_t t = 0; t < q.tokens; ++t) {
    shape.max_keys = std::max(shape.max_keys, visible(t));
  }
  return shape;
}

Prefix::Prefix(const StepInputs& inputs, std::int64_t keys) : inputs_(inputs) {
  if (auto* ragged = std::get_if<RaggedKeys>(&inputs_.k)) {
    for (std::size_t t = 0; t < ragged->ends.size(); ++t) {
      const std::int64_t end = std::int64_t{ragged->starts[t]} + keys;
      lengths_.push_back(static_cast<std::int32_t>(std::min<std::int64_t>(ragged->ends[t], end)));
    }
    ragged->ends = lengths_;
  } else {
    auto& paged = std::get<PagedKeys>(inputs_.k);
    for (const std::int32_t length : paged.context_lens) {
      lengths_.push_back(static_cast<std::int32_t>(std::min<std::int64_t>(length, keys)));
    }
    paged.context_lens = lengths_;
  }
}

Selected select(const Context& context, const IndexerConfig& config, const StepInputs& inputs,
                Want want) {
  return std::visit(
      [&](const auto& k) { return misa::select(context, config, inputs.q, inputs.w, k, want); },
      inputs.k);
}

StepTiming time_step(const Context& context, const IndexerConfig& config, const StepInputs& inputs,
                     int runs) {
  const Plan plan(context, config, inputs.shape());
  const Buffer workspace(plan.workspace_bytes());
  std::vector<std::int32_t> indices(static_cast<std::size_t>(inputs.q.tokens * config.top_k));
  const Timing step = std::visit(
      [&](const auto& k) {
        return measure(runs, [&] {
          plan.run(inputs.q, inputs.w, k, {indices, {}, {}, {}}, workspace.span());
        });
      },
      inputs.k);
  return {step, plan.workspace_bytes()};
}

Cost mean_cost(const IndexerConfig& config, const StepInputs& inputs) {
  const Shape shape = inputs.shape();
  Cost sum;
  for (std::int64_t t = 0; t < shape.tokens; ++t) {
    const Cost cost = cost_of(config, shape, inputs.visible(t));
    sum.dots += cost.dots;
    sum.bytes += cost.bytes;
  }
  const double rows = static_cast<double>(std::max<std::int64_t>(1, shape.tokens));
  return {sum.dots / rows, sum.bytes / rows};
}

}  // namespace misa::cli
