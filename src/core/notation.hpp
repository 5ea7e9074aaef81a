// SPDX-License-Identifier: Apache-2.0
// Indexers as people write them: a name and the settings that differ from the published ones, e.g.
// misa-r:h=3:m=2k. The program and the Python package read this notation here.
#pragma once

#include <string_view>

#include "misa/indexer.hpp"

namespace misa {

struct NotedIndexer {
  std::string_view name;  // the part of the text before its settings
  IndexerConfig config;
};

// Throws Error for an unknown name, setting or value. m=2k and dense=2k mean twice top_k.
NotedIndexer indexer_of_notation(std::string_view text, int top_k);

}  // namespace misa
