// SPDX-License-Identifier: Apache-2.0
// What a comparison says of all its traces together.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "report.hpp"

namespace misa::cli {

// Gives each trace the name that a reader knows it by: the number of its layer where all traces are
// numbered layers of one model; else its file's name without folder and suffix, if no other has the
// same; else the file as the user wrote it.
void name_traces(std::vector<TraceResult>& traces);

// The traces by their names, in which layer 2 comes before layer 10.
std::vector<TraceResult> by_name(std::vector<TraceResult> traces);

// A trace by its name within a sentence: "layer 17", or its file's name.
std::string spoken(const std::string& name);

// One indexer on all traces. Means are over traces; recall is a trace's mean.
struct Overall {
  struct Worst {
    std::string trace;  // its name
    double recall;
  };

  std::string label;
  bool dense = false;            // DSA itself
  std::size_t rated = 0;         // traces that have a recall
  std::optional<double> recall;  // theirs
  std::optional<Worst> worst;    // the trace of least recall
  std::optional<AttentionKept> attention;
  std::optional<double> seconds;  // per query
  std::optional<double> spread;
  std::optional<double> speed;      // the time of DSA over all traces by that of this indexer
  Cost cost;                        // per query
  std::size_t workspace_bytes = 0;  // the most of any trace
};
std::vector<Overall> overall(const std::vector<TraceResult>& traces);

// The recall in the worst layer from which on an indexer is recommended for its speed.
inline constexpr double kGoodRecall = 0.95;

// One sentence about the fastest indexer beside DSA that has kGoodRecall in its worst trace, or
// that with the best worst trace if none has; without times the one with the fewest dot products.
// Empty where there is nothing to compare.
std::string verdict(const std::vector<Overall>& indexers);

}  // namespace misa::cli
