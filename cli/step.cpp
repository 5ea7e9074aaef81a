// SPDX-License-Identifier: Apache-2.0
#include "step.hpp"

#include <algorithm>
#include <span>

namespace misa::cli {
namespace {

// Queries of a part for each thread, so that all threads have enough to do until its end.
constexpr std::int64_t kPartPerThread = 32;

// `count` queries from query `first` on, whole sequences if the keys are paged. They refer to the
// tensors of all.
StepInputs part_of(const StepInputs& all, std::int64_t first, std::int64_t count) {
  StepInputs part = all;
  const std::int64_t heads = all.q.heads;
  part.q.tokens = count;
  part.q.data = static_cast<const std::byte*>(all.q.data) +
                static_cast<std::int64_t>(size_of(all.q.dtype)) * first * heads * all.q.dim;
  part.w.tokens = count;
  part.w.data = all.w.data + first * heads;
  const auto cut = [](std::span<const std::int32_t>& rows, std::int64_t begin, std::int64_t size) {
    rows = rows.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(size));
  };
  if (auto* ragged = std::get_if<RaggedKeys>(&part.k)) {
    cut(ragged->starts, first, count);
    cut(ragged->ends, first, count);
  } else {
    auto& paged = std::get<PagedKeys>(part.k);
    paged.block_table += first / paged.next_n * paged.max_pages;
    cut(paged.context_lens, first / paged.next_n, count / paged.next_n);
  }
  return part;
}

}  // namespace

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

std::vector<std::int32_t> select_in_parts(const Context& context, const IndexerConfig& config,
                                          const StepInputs& inputs,
                                          const std::function<void(std::int64_t)>& after_each) {
  const auto* paged = std::get_if<PagedKeys>(&inputs.k);
  const std::int64_t whole = paged != nullptr ? paged->next_n : 1;
  const std::int64_t wanted = kPartPerThread * context.threads();
  const std::int64_t size = (wanted + whole - 1) / whole * whole;
  std::vector<std::int32_t> indices;
  indices.reserve(static_cast<std::size_t>(inputs.q.tokens * config.top_k));
  for (std::int64_t first = 0; first < inputs.q.tokens; first += size) {
    const std::int64_t count = std::min(size, inputs.q.tokens - first);
    const Selected selected = select(context, config, part_of(inputs, first, count));
    indices.insert(indices.end(), selected.indices.begin(), selected.indices.end());
    after_each(count);
  }
  return indices;
}

void TimedSteps::add(const IndexerConfig& config, const StepInputs& inputs) {
  steps_.push_back(
      {Plan(context_, config, inputs.shape()), &inputs, inputs.q.tokens * config.top_k});
}

std::vector<Contender> TimedSteps::contenders() {
  std::size_t bytes = 0;
  std::int64_t indices = 0;
  for (const Step& step : steps_) {
    bytes = std::max(bytes, step.plan.workspace_bytes());
    indices = std::max(indices, step.indices);
  }
  workspace_.emplace(bytes);
  indices_.resize(static_cast<std::size_t>(indices));
  std::vector<Contender> contenders;
  for (const Step& step : steps_) {
    contenders.emplace_back([this, &step] {
      const auto room = std::span(indices_).first(static_cast<std::size_t>(step.indices));
      std::visit(
          [&](const auto& k) {
            step.plan.run(step.inputs->q, step.inputs->w, k, {room, {}, {}, {}},
                          workspace_->span());
          },
          step.inputs->k);
    });
  }
  return contenders;
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
