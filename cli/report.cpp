// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>
#include <sstream>
#include <string_view>
#include <utility>

#include "options.hpp"
#include "report/template.hpp"
#include "summary.hpp"
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

json to_json(const AttentionKept& attention) {
  return {{"kept", attention.absolute}, {"of_dsa", attention.of_dsa}};
}

json or_null(std::optional<double> value) { return value ? json(*value) : json(); }

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
                                {"spread", or_null(result.query.spread)}};
  }
  if (result.recall) {
    out["recall"] = {
        {"mean", result.recall->mean}, {"q05", result.recall->low}, {"min", result.recall->min}};
  }
  if (result.attention) {
    out["attention"] = to_json(*result.attention);
  }
  return out;
}

json to_json(const TraceResult& trace) {
  json indexers = json::array();
  for (const IndexerResult& result : trace.indexers) {
    indexers.push_back(to_json(result));
  }
  return {{"file", trace.file},
          {"sha256", trace.sha256},
          {"name", trace.name},
          {"model", trace.model},
          {"queries", trace.shape.tokens},
          {"heads", trace.shape.heads},
          {"dim", trace.shape.dim},
          {"keys", trace.shape.max_keys},
          {"q_dtype", name_of(trace.shape.q_dtype)},
          {"k_dtype", name_of(trace.shape.k_dtype)},
          {"long_rows", trace.long_rows},
          {"attention_bound", or_null(trace.attention_bound)},
          {"indexers", std::move(indexers)},
          {"sweeps", trace.sweeps ? to_json(*trace.sweeps) : json()}};
}

json to_json(const Overall& indexer) {
  json out{{"label", indexer.label},
           {"recall", or_null(indexer.recall)},
           {"worst", nullptr},
           {"attention", nullptr},
           {"seconds_per_query", or_null(indexer.seconds)},
           {"spread", or_null(indexer.spread)},
           {"speed", or_null(indexer.speed)},
           {"keys_x_heads", indexer.cost.dots},
           {"bytes_read", indexer.cost.bytes},
           {"workspace_bytes", indexer.workspace_bytes}};
  if (indexer.worst) {
    out["worst"] = {{"trace", indexer.worst->trace}, {"recall", indexer.worst->recall}};
  }
  if (indexer.attention) {
    out["attention"] = to_json(*indexer.attention);
  }
  return out;
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
  for (const auto& seconds :
       {timed ? std::optional(result.query.median) : std::nullopt, result.query.spread}) {
    cells.push_back(seconds ? fmt::format("{:.1f}", 1e6 * *seconds) : "–");
  }
  cells.push_back(timed && dense != nullptr
                      ? fmt::format("{:.1f}×", dense->query.median / result.query.median)
                      : "–");
  cells.push_back(grouped(result.cost.dots));
  cells.push_back(bytes(result.cost.bytes));
  cells.push_back(bytes(static_cast<double>(result.workspace_bytes)));
  return cells;
}

// What to know of queries that see few keys.
std::string note_on_rows(const TraceResult& trace, int top_k) {
  if (trace.long_rows == 0) {
    return fmt::format(
        "  No query sees more than {} keys: every indexer selects everything, and there is\n"
        "  nothing to compare. A smaller --top-k would tell them apart.\n",
        top_k);
  }
  return trace.long_rows == trace.shape.tokens ? std::string()
                                               : fmt::format(
                                                     "  {} of {} queries see more than {} keys; "
                                                     "the others count in the times only.\n",
                                                     trace.long_rows, trace.shape.tokens, top_k);
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
  std::string text = fmt::format(
      "{} · {} keys · {} heads × {} · {} queries · {} keys\n\n{}", one_line(spoken(trace.name)),
      grouped(static_cast<double>(trace.shape.max_keys)), trace.shape.heads, trace.shape.dim,
      trace.shape.tokens, name_of(trace.shape.k_dtype), aligned(rows));
  text += note_on_rows(trace, top_k);
  if (trace.attention_bound) {
    text += fmt::format("  Any {} positions hold {} of the attention at most.\n", top_k,
                        percent(*trace.attention_bound));
  }
  if (!trace.model.empty()) {
    text += fmt::format("  Model: {}.\n", one_line(trace.model));
  }
  return text;
}

// Words of a label in lines of about eight characters, for the head of a narrow column.
Cells lines_of(const std::string& label) {
  constexpr std::size_t kWidth = 8;
  Cells lines;
  std::istringstream words(label);
  for (std::string word; words >> word;) {
    if (!lines.empty() && lines.back().size() + 1 + word.size() <= kWidth) {
      lines.back() += ' ' + word;
    } else {
      lines.push_back(word);
    }
  }
  return lines;
}

// "7" or "3 to 7", grouped.
std::string range_of(const std::vector<TraceResult>& traces, std::int64_t Shape::*size) {
  const auto [least, most] = std::minmax_element(
      traces.begin(), traces.end(),
      [size](const TraceResult& a, const TraceResult& b) { return a.shape.*size < b.shape.*size; });
  const auto text = [size](const TraceResult& t) {
    return grouped(static_cast<double>(t.shape.*size));
  };
  return least->shape.*size == most->shape.*size ? text(*least)
                                                 : text(*least) + " to " + text(*most);
}

// The different texts of all traces, separated by commas.
template <class Text>
std::string distinct(const std::vector<TraceResult>& traces, const Text& text_of) {
  std::vector<std::string> texts;
  for (const TraceResult& trace : traces) {
    if (std::string text = text_of(trace);
        !text.empty() && std::find(texts.begin(), texts.end(), text) == texts.end()) {
      texts.push_back(std::move(text));
    }
  }
  return fmt::format("{}", fmt::join(texts, ", "));
}

// One table of all traces: a row each, a column an indexer, with what holds of all below.
std::string to_text(const std::vector<TraceResult>& traces, int top_k) {
  const std::vector<Overall> indexers = overall(traces);
  std::vector<Cells> heads;
  std::size_t height = 0;
  for (const Overall& indexer : indexers) {
    heads.push_back(lines_of(indexer.label));
    height = std::max(height, heads.back().size());
  }
  std::vector<Cells> rows;
  for (std::size_t line = 0; line < height; ++line) {
    rows.push_back({line + 1 == height ? "recall" : ""});
    for (const Cells& head : heads) {
      const std::size_t skipped = height - head.size();
      rows.back().push_back(line < skipped ? "" : head[line - skipped]);
    }
  }
  const auto add = [&](std::string name, const auto& results, const auto& cell) {
    rows.push_back({std::move(name)});
    for (const auto& result : results) {
      const std::optional<std::string> text = cell(result);
      rows.back().push_back(text.value_or("–"));
    }
  };
  using Cell = std::optional<std::string>;
  for (const TraceResult& trace : traces) {
    add(one_line(spoken(trace.name)), trace.indexers,
        [](const IndexerResult& r) { return r.recall ? Cell(percent(r.recall->mean)) : Cell(); });
  }
  rows.emplace_back(rows.front().size());
  const auto add_overall = [&](const char* name, const auto& cell) { add(name, indexers, cell); };
  add_overall("mean",
              [](const Overall& i) { return i.recall ? Cell(percent(*i.recall)) : Cell(); });
  add_overall("worst",
              [](const Overall& i) { return i.worst ? Cell(percent(i.worst->recall)) : Cell(); });
  if (std::any_of(indexers.begin(), indexers.end(),
                  [](const Overall& i) { return i.attention.has_value(); })) {
    add_overall("attention kept", [](const Overall& i) {
      return i.attention ? Cell(percent(i.attention->absolute)) : Cell();
    });
    add_overall("  of DSA's", [](const Overall& i) {
      return i.attention ? Cell(percent(i.attention->of_dsa)) : Cell();
    });
  }
  const auto micros = [](std::optional<double> seconds) {
    return seconds ? Cell(fmt::format("{:.1f}", 1e6 * *seconds)) : Cell();
  };
  add_overall("µs a query", [&](const Overall& i) { return micros(i.seconds); });
  add_overall("  ±", [&](const Overall& i) { return micros(i.spread); });
  add_overall("speed vs DSA", [](const Overall& i) {
    return i.speed ? Cell(fmt::format("{:.1f}×", *i.speed)) : Cell();
  });
  add_overall("keys × heads a query", [](const Overall& i) { return Cell(grouped(i.cost.dots)); });
  add_overall("bytes read a query", [](const Overall& i) { return Cell(bytes(i.cost.bytes)); });
  add_overall("workspace",
              [](const Overall& i) { return Cell(bytes(static_cast<double>(i.workspace_bytes))); });

  std::string text = fmt::format(
      "{} traces · {} keys · {} heads × {} · {} queries · {} keys\n\n{}", traces.size(),
      range_of(traces, &Shape::max_keys), range_of(traces, &Shape::heads),
      range_of(traces, &Shape::dim), range_of(traces, &Shape::tokens),
      distinct(traces, [](const TraceResult& t) { return std::string(name_of(t.shape.k_dtype)); }),
      aligned(rows));
  TraceResult all;
  for (const TraceResult& trace : traces) {
    all.long_rows += trace.long_rows;
    all.shape.tokens += trace.shape.tokens;
  }
  text += note_on_rows(all, top_k);
  if (const std::string models =
          distinct(traces, [](const TraceResult& t) { return one_line(t.model); });
      !models.empty()) {
    text += fmt::format("  Model: {}.\n", models);
  }
  return text + "  --json has each trace's minima, attention and times.\n";
}

}  // namespace

json to_json(const Comparison& comparison) {
  json traces = json::array();
  for (const TraceResult& trace : comparison.traces) {
    traces.push_back(to_json(trace));
  }
  json facts = json::object();
  for (const Fact& fact : comparison.facts) {
    facts[fact.name] = fact.value;
  }
  const std::vector<Overall> indexers = overall(comparison.traces);
  json summary = json::array();
  for (const Overall& indexer : indexers) {
    summary.push_back(to_json(indexer));
  }
  const std::string warning = busy_warning(comparison.waited);
  const std::string sentence = verdict(indexers);
  return {{"version", comparison.version},
          {"date", comparison.date},
          {"command", comparison.command},
          {"facts", std::move(facts)},
          {"processor", comparison.processor},
          {"backend", comparison.backend},
          {"isa", comparison.isa},
          {"threads", comparison.threads},
          {"runs", comparison.runs},
          {"top_k", comparison.top_k},
          {"waited_for_processor", or_null(comparison.waited)},
          {"warning", warning.empty() ? json() : json(warning)},
          {"verdict", sentence.empty() ? json() : json(sentence)},
          {"summary", std::move(summary)},
          {"traces", std::move(traces)}};
}

std::string to_text(const Comparison& comparison) {
  std::string text = fmt::format(
      "{} · {} ({}), {} · {}\n"
      "Recall is the share of DSA's top {} that an indexer selects too, over the queries that see\n"
      "more than {} keys; ± is half the distance between the quartiles.\n",
      comparison.processor, comparison.backend, comparison.isa,
      comparison.threads == 1 ? "1 thread" : fmt::format("{} threads", comparison.threads),
      comparison.runs == 0   ? "not timed"
      : comparison.runs == 1 ? "one run"
                             : fmt::format("medians of {} runs", comparison.runs),
      comparison.top_k, comparison.top_k);
  const std::vector<TraceResult>& traces = comparison.traces;
  text += '\n' + (traces.size() == 1 ? to_text(traces.front(), comparison.top_k)
                                     : to_text(by_name(traces), comparison.top_k));
  if (const std::string sentence = verdict(overall(traces)); !sentence.empty()) {
    text += fmt::format("\n{}\n", one_line(sentence));
  }
  return text;
}

std::string to_html(const Comparison& comparison) {
  Comparison sorted = comparison;
  sorted.traces = by_name(std::move(sorted.traces));
  // Names of files need not be UTF-8.
  std::string data = to_json(sorted).dump(-1, ' ', false, json::error_handler_t::replace);
  // In a script element "<" may begin the end tag or a comment, even inside a string.
  for (std::size_t at = data.find('<'); at != std::string::npos; at = data.find('<', at)) {
    data.replace(at, 1, "\\u003c");
  }
  std::string page(kReportTemplate);
  page.replace(page.find(kReportData), kReportData.size(), data);
  return page;
}

}  // namespace misa::cli
