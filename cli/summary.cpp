// SPDX-License-Identifier: Apache-2.0
#include "summary.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>
#include <string_view>
#include <utility>

namespace misa::cli {
namespace {

bool is_number(std::string_view text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

// Whether text_of(trace) differs from trace to trace.
template <class Text>
bool all_differ(const std::vector<TraceResult>& traces, const Text& text_of) {
  std::set<std::string> texts;
  return std::all_of(traces.begin(), traces.end(),
                     [&](const TraceResult& t) { return texts.insert(text_of(t)).second; });
}

std::string stem(const TraceResult& trace) {
  return std::filesystem::path(trace.file).stem().string();
}

// The mean of value(result) over an indexer's results that have one.
template <class Value>
std::optional<double> mean_of(const std::vector<const IndexerResult*>& results,
                              const Value& value) {
  std::vector<double> values;
  for (const IndexerResult* result : results) {
    if (const std::optional<double> x = value(*result)) {
      values.push_back(*x);
    }
  }
  return values.empty() ? std::nullopt : std::optional(mean(values));
}

Overall overall_of(const std::vector<TraceResult>& traces, std::size_t indexer) {
  std::vector<const IndexerResult*> results;
  for (const TraceResult& trace : traces) {
    results.push_back(&trace.indexers[indexer]);
  }
  const auto of = [&](const auto& value) { return mean_of(results, value); };
  using Maybe = std::optional<double>;
  Overall all;
  all.label = results.front()->label;
  all.dense = results.front()->name == "dsa";
  all.recall =
      of([](const IndexerResult& r) { return r.recall ? Maybe(r.recall->mean) : Maybe(); });
  for (const TraceResult& trace : traces) {
    const std::optional<Summary>& recall = trace.indexers[indexer].recall;
    all.rated += recall ? 1 : 0;
    if (recall && (!all.worst || recall->mean < all.worst->recall)) {
      all.worst = {trace.name, recall->mean};
    }
  }
  const Maybe kept = of(
      [](const IndexerResult& r) { return r.attention ? Maybe(r.attention->absolute) : Maybe(); });
  const Maybe of_dsa =
      of([](const IndexerResult& r) { return r.attention ? Maybe(r.attention->of_dsa) : Maybe(); });
  if (kept && of_dsa) {
    all.attention = {*kept, *of_dsa};
  }
  const auto time = [](double Timing::*part) {
    return [part](const IndexerResult& r) {
      return r.query.runs > 0 ? Maybe(r.query.*part) : Maybe();
    };
  };
  all.seconds = of(time(&Timing::median));
  all.spread = of([](const IndexerResult& r) { return r.query.spread; });
  all.cost = {*of([](const IndexerResult& r) { return Maybe(r.cost.dots); }),
              *of([](const IndexerResult& r) { return Maybe(r.cost.bytes); })};
  for (const IndexerResult* result : results) {
    all.workspace_bytes = std::max(all.workspace_bytes, result->workspace_bytes);
  }
  return all;
}

const Overall* dense_of(const std::vector<Overall>& indexers) {
  const auto at = std::find_if(indexers.begin(), indexers.end(),
                               [](const Overall& indexer) { return indexer.dense; });
  return at == indexers.end() ? nullptr : &*at;
}

// "4.6 × less indexer time than DSA, ", if there is a DSA to compare with.
std::string gain(const Overall& best, const Overall* dense) {
  if (best.speed) {
    return *best.speed >= 1 ? fmt::format("{:.1f} × less indexer time than DSA, ", *best.speed)
                            : fmt::format("{:.1f} × the indexer time of DSA, ", 1 / *best.speed);
  }
  if (dense == nullptr || best.seconds) {
    return {};
  }
  const double ratio = dense->cost.dots / best.cost.dots;
  return ratio >= 1 ? fmt::format("{:.1f} × fewer keys × heads than DSA, ", ratio)
                    : fmt::format("{:.1f} × the keys × heads of DSA, ", 1 / ratio);
}

}  // namespace

void name_traces(std::vector<TraceResult>& traces) {
  const bool layers = std::all_of(traces.begin(), traces.end(),
                                  [&](const TraceResult& t) {
                                    const TraceResult& first = traces.front();
                                    return is_number(t.layer) && t.model == first.model &&
                                           t.shape.heads == first.shape.heads &&
                                           t.shape.dim == first.shape.dim;
                                  }) &&
                      all_differ(traces, [](const TraceResult& t) { return t.layer; });
  const bool stems = all_differ(traces, stem);
  for (TraceResult& trace : traces) {
    trace.name = layers ? trace.layer : stems ? stem(trace) : trace.file;
  }
}

std::vector<TraceResult> by_name(std::vector<TraceResult> traces) {
  std::stable_sort(traces.begin(), traces.end(), [](const TraceResult& a, const TraceResult& b) {
    return ::strverscmp(a.name.c_str(), b.name.c_str()) < 0;
  });
  return traces;
}

std::string spoken(const std::string& name) { return is_number(name) ? "layer " + name : name; }

std::vector<Overall> overall(const std::vector<TraceResult>& traces) {
  std::vector<Overall> indexers;
  for (std::size_t i = 0; i < traces.front().indexers.size(); ++i) {
    indexers.push_back(overall_of(traces, i));
  }
  if (const Overall* dense = dense_of(indexers); dense != nullptr && dense->seconds) {
    const double time = *dense->seconds;
    for (Overall& indexer : indexers) {
      indexer.speed = time / *indexer.seconds;
    }
  }
  return indexers;
}

std::string verdict(const std::vector<Overall>& indexers) {
  const auto good = [](const Overall& indexer) { return indexer.worst->recall >= kGoodRecall; };
  const auto merit = [&](const Overall& indexer) {
    const double work = indexer.seconds.value_or(indexer.cost.dots);
    return std::pair(good(indexer), good(indexer) ? -work : indexer.worst->recall);
  };
  const Overall* best = nullptr;
  for (const Overall& indexer : indexers) {
    if (!indexer.dense && indexer.worst && (best == nullptr || merit(indexer) > merit(*best))) {
      best = &indexer;
    }
  }
  if (best == nullptr) {
    return {};
  }
  const std::string& name = best->worst->trace;
  const std::string where = best->rated == 1  ? spoken(name)
                            : is_number(name) ? "worst layer " + name
                                              : "worst trace, " + name + ",";
  return fmt::format("{}: {}{} keeps {:.1f} % of DSA's set{}.", best->label,
                     gain(*best, dense_of(indexers)), where, 100 * best->worst->recall,
                     good(*best) ? "" : ", the most of these indexers");
}

}  // namespace misa::cli
