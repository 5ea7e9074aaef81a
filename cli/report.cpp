// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <string_view>

#include "options.hpp"
#include "report/template.hpp"
#include "table.hpp"
#include "variant.hpp"

namespace misa::cli {
namespace {

using json = nlohmann::ordered_json;

json points_of(const std::vector<Curve>& curves) {
  json out = json::array();
  for (const Curve& curve : curves) {
    json points = json::array();
    for (const Point& point : curve.points) {
      points.push_back({{"x", point.x}, {"y", point.y}});
    }
    out.push_back({{"label", curve.label}, {"points", std::move(points)}});
  }
  return out;
}

json to_json(const Sweeps& sweeps) {
  json use = json::array();
  for (const HeadUse& router : sweeps.head_use) {
    use.push_back({{"router", router.router}, {"share", router.share}});
  }
  return {{"head_use_heads", sweeps.head_use_heads},
          {"head_use", std::move(use)},
          {"recall_by_heads", points_of(sweeps.recall_by_heads)},
          {"time_by_keys", points_of(sweeps.time_by_keys)}};
}

json to_json(const IndexerResult& result) {
  json out{{"name", result.name},
           {"label", result.label},
           {"settings", settings_of(result.config)},
           {"recall", nullptr},
           {"attention", nullptr},
           {"seconds_per_query", nullptr},
           {"keys_x_heads", result.cost.dots},
           {"bytes_read", result.cost.bytes},
           {"workspace_bytes", result.workspace_bytes}};
  if (result.query.runs > 0) {
    out["seconds_per_query"] = {{"median", result.query.median},
                                {"fastest", result.query.fastest},
                                {"slowest", result.query.slowest},
                                {"spread", result.query.spread}};
  }
  if (result.recall) {
    out["recall"] = {
        {"mean", result.recall->mean}, {"q05", result.recall->low}, {"min", result.recall->min}};
  }
  if (result.attention) {
    out["attention"] = {{"kept", result.attention->absolute}, {"of_dsa", result.attention->of_dsa}};
  }
  return out;
}

json share_of(std::optional<double> share) { return share ? json(*share) : json(); }

json to_json(const TraceResult& trace) {
  json indexers = json::array();
  for (const IndexerResult& result : trace.indexers) {
    indexers.push_back(to_json(result));
  }
  return {{"file", trace.file},
          {"model", trace.model},
          {"queries", trace.shape.tokens},
          {"heads", trace.shape.heads},
          {"dim", trace.shape.dim},
          {"keys", trace.shape.max_keys},
          {"q_dtype", name_of(trace.shape.q_dtype)},
          {"k_dtype", name_of(trace.shape.k_dtype)},
          {"long_rows", trace.long_rows},
          {"attention_bound", share_of(trace.attention_bound)},
          {"indexers", std::move(indexers)},
          {"sweeps", trace.sweeps ? to_json(*trace.sweeps) : json()}};
}

std::string percent(double share) { return fmt::format("{:.1f} %", 100 * share); }

std::string grouped(double value) {
  std::string digits = fmt::format("{:.0f}", value);
  for (auto at = std::ssize(digits) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<std::size_t>(at), 1, ' ');
  }
  return digits;
}

std::string bytes(double value) {
  return value >= 1e6 ? fmt::format("{:.1f} MB", value / 1e6)
                      : fmt::format("{:.0f} kB", value / 1e3);
}

Cells cells_of(const IndexerResult& result, const IndexerResult* dense, bool attention) {
  Cells cells{result.label};
  const auto add = [&](bool known, double share) { cells.push_back(known ? percent(share) : "–"); };
  const Summary recall = result.recall.value_or(Summary{});
  for (const double share : {recall.mean, recall.low, recall.min}) {
    add(result.recall.has_value(), share);
  }
  if (attention) {
    const AttentionKept kept = result.attention.value_or(AttentionKept{});
    add(result.attention.has_value(), kept.absolute);
    add(result.attention.has_value(), kept.of_dsa);
  }
  const bool timed = result.query.runs > 0;
  for (const double seconds : {result.query.median, result.query.spread}) {
    cells.push_back(timed ? fmt::format("{:.1f}", 1e6 * seconds) : "–");
  }
  cells.push_back(timed && dense != nullptr
                      ? fmt::format("{:.1f}×", dense->query.median / result.query.median)
                      : "–");
  cells.push_back(grouped(result.cost.dots));
  cells.push_back(bytes(result.cost.bytes));
  cells.push_back(bytes(static_cast<double>(result.workspace_bytes)));
  return cells;
}

std::string to_text(const TraceResult& trace, int top_k) {
  const bool attention =
      std::any_of(trace.indexers.begin(), trace.indexers.end(),
                  [](const IndexerResult& r) { return r.attention.has_value(); });
  const auto dense = std::find_if(trace.indexers.begin(), trace.indexers.end(),
                                  [](const IndexerResult& r) { return r.name == "dsa"; });
  Cells above{"", "recall", "recall", "recall"};
  Cells below{"indexer", "mean", "5 %", "min"};
  if (attention) {
    above.insert(above.end(), {"attention", "attention"});
    below.insert(below.end(), {"kept", "of DSA's"});
  }
  above.insert(above.end(), {"µs", "", "speed", "keys × heads", "bytes read", ""});
  below.insert(below.end(), {"a query", "±", "vs DSA", "a query", "a query", "workspace"});
  std::vector<Cells> rows{above, below};
  for (const IndexerResult& result : trace.indexers) {
    rows.push_back(cells_of(result, dense != trace.indexers.end() ? &*dense : nullptr, attention));
  }
  std::string text =
      fmt::format("{} · {} keys · {} heads × {} · {} queries · {} keys\n\n{}",
                  one_line(std::filesystem::path(trace.file).stem().string()),
                  grouped(static_cast<double>(trace.shape.max_keys)), trace.shape.heads,
                  trace.shape.dim, trace.shape.tokens, name_of(trace.shape.k_dtype), aligned(rows));
  if (trace.long_rows == 0) {
    text += fmt::format(
        "  No query sees more than {} keys: every indexer selects everything, and there is\n"
        "  nothing to compare. A smaller --top-k would tell them apart.\n",
        top_k);
  } else if (trace.long_rows < trace.shape.tokens) {
    text += fmt::format(
        "  {} of {} queries see more than {} keys; the others count in the times only.\n",
        trace.long_rows, trace.shape.tokens, top_k);
  }
  if (trace.attention_bound) {
    text += fmt::format("  Any {} positions hold {} of the attention at most.\n", top_k,
                        percent(*trace.attention_bound));
  }
  if (!trace.model.empty()) {
    text += fmt::format("  Model: {}.\n", one_line(trace.model));
  }
  return text;
}

}  // namespace

json to_json(const Comparison& comparison) {
  json traces = json::array();
  for (const TraceResult& trace : comparison.traces) {
    traces.push_back(to_json(trace));
  }
  const std::string warning = busy_warning(comparison.waited);
  return {{"version", comparison.version},
          {"processor", comparison.processor},
          {"backend", comparison.backend},
          {"isa", comparison.isa},
          {"threads", comparison.threads},
          {"runs", comparison.runs},
          {"top_k", comparison.top_k},
          {"waited_for_processor", share_of(comparison.waited)},
          {"warning", warning.empty() ? json() : json(warning)},
          {"traces", std::move(traces)}};
}

std::string to_text(const Comparison& comparison) {
  std::string text = fmt::format(
      "{} · {} ({}), {} · {}\n"
      "Recall is the share of DSA's top {} that an indexer selects too, over the queries that see\n"
      "more than {} keys; ± is half the distance between the quartiles.\n",
      comparison.processor, comparison.backend, comparison.isa,
      comparison.threads == 1 ? "1 thread" : fmt::format("{} threads", comparison.threads),
      comparison.runs > 0 ? fmt::format("medians of {} runs", comparison.runs) : "not timed",
      comparison.top_k, comparison.top_k);
  for (const TraceResult& trace : comparison.traces) {
    text += '\n' + to_text(trace, comparison.top_k);
  }
  return text;
}

std::string to_html(const Comparison& comparison) {
  // Names of files need not be UTF-8.
  std::string data = to_json(comparison).dump(-1, ' ', false, json::error_handler_t::replace);
  // In a script element "<" may begin the end tag or a comment, even inside a string.
  for (std::size_t at = data.find('<'); at != std::string::npos; at = data.find('<', at)) {
    data.replace(at, 1, "\\u003c");
  }
  std::string page(kReportTemplate);
  page.replace(page.find(kReportData), kReportData.size(), data);
  return page;
}

}  // namespace misa::cli
