// SPDX-License-Identifier: Apache-2.0
// How the CPU backend cuts queries: into chunks that fit the workspace, and a chunk into work
// items.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"
#include "indexers/cpu_workspace.hpp"

namespace misa::cpu {

// Queries that go through the stages together. When they are scored, a query block and a key split
// are a work item.
struct QueryChunk {
  std::span<Query> queries;
  std::span<SequenceKeys> sequences;
  std::span<QueryBlock> blocks;
  std::int64_t key_splits;
};

// The queries from `first` on whose sequences fit the workspace, at least one. Queries have their
// recipes, block means have their memory.
QueryChunk cut_chunk(const Problem& problem, const WorkspaceSpec& spec, const Workspace& workspace,
                     std::int64_t first);

}  // namespace misa::cpu
