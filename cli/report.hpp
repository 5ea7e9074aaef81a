// SPDX-License-Identifier: Apache-2.0
// The results of `compare` and their three formats: table, JSON, HTML page.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "core/recipe.hpp"
#include "metrics.hpp"
#include "misa/context.hpp"
#include "timing.hpp"

namespace misa::cli {

// Attention on the selected positions, as a share of all attention and of that on DSA's selection.
struct AttentionKept {
  double absolute;
  double of_dsa;
};

// One indexer on one trace.
struct IndexerResult {
  std::string name;
  std::string label;
  std::optional<Summary> recall;  // of DSA's set; none if no row sees more than top_k keys
  std::optional<AttentionKept> attention;
  Timing query;  // seconds per query; no runs: not timed
  Cost cost;     // per query
  std::size_t workspace_bytes = 0;
  IndexerConfig config;
};

struct Point {
  double x;
  double y;
};

struct Curve {
  std::string label;
  std::vector<Point> points;
};

// How often a router chooses each head, as shares of the rows, [H].
struct HeadUse {
  std::string router;
  std::vector<double> share;
};

// What only the HTML page shows. There are no times without runs.
struct Sweeps {
  int head_use_heads = 0;  // h of head_use
  std::vector<HeadUse> head_use;
  std::vector<Curve> recall_by_heads;  // x: h
  std::vector<Curve> time_by_keys;     // x: keys that a query sees; y: seconds per query
};

struct TraceResult {
  std::string file;
  std::string sha256;  // of the file
  std::string layer;   // Trace::layer()
  std::string name;    // what tables and plots call it: name_traces()
  std::string model;   // from the file's metadata; may be empty
  Shape shape;
  std::int64_t long_rows = 0;             // rows of n > top_k; the others select everything
  std::optional<double> attention_bound;  // the most attention that top_k positions can hold
  std::vector<IndexerResult> indexers;
  std::optional<double> waited;  // Timings::waited, the most of any of its measurements
  std::optional<Sweeps> sweeps;
};

struct Comparison {
  std::string version;
  std::string date;     // utc_now()
  std::string command;  // command_line()
  std::vector<Fact> facts;
  std::string processor;
  std::string backend;
  std::string isa;
  int threads = 0;
  int runs = 0;
  int top_k = 0;
  std::optional<double> waited;  // Timings::waited, the most of any trace
  std::vector<TraceResult> traces;
};

nlohmann::ordered_json to_json(const Comparison& comparison);

// For a terminal: the table of one trace, or one table of all traces, a row each.
std::string to_text(const Comparison& comparison);

// An HTML page that needs no other file.
std::string to_html(const Comparison& comparison);

}  // namespace misa::cli
