// SPDX-License-Identifier: Apache-2.0
// Running indexers on generated inputs and judging what comes back.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "misa/indexer.hpp"
#include "support/inputs.hpp"

namespace misa::test {

// The backends that this machine can run.
std::vector<std::string> available_backends();

// A context with one thread: what most tests want.
Context context_for(const std::string& backend, int threads = 1);

// Runs some rows of a layout and asks for every output.
Selected run(const Context& context, const IndexerConfig& config, const RaggedInputs& inputs,
             Rows rows);
Selected run(const Context& context, const IndexerConfig& config, const RaggedInputs& inputs);
Selected run(const Context& context, const IndexerConfig& config, const PagedInputs& inputs,
             Rows rows);
Selected run(const Context& context, const IndexerConfig& config, const PagedInputs& inputs);

// Appends the rows of `part` to `whole`.
void append_rows(Selected& whole, const Selected& part);

// The rows [first, first + count) of a selection.
Selected slice(const Selected& whole, Rows rows);

// Equal bit for bit, whatever was returned.
::testing::AssertionResult same_bits(const Selected& a, const Selected& b);

// Judges every row by the rules of the specification. Stages are judged one after the other, each
// on what the backend reported of the one before: the heads against the reference's values of
// them, the residual row for those heads, the scores for those heads and that row, and the set by
// those scores. A position may be in or out only where its interval (tolerance.hpp) leaves the
// choice open; the backend's name says how wide it is.
::testing::AssertionResult valid(const IndexerConfig& config, const RaggedInputs& inputs,
                                 const Selected& result, std::string_view backend = "cpu");
::testing::AssertionResult valid(const IndexerConfig& config, const PagedInputs& inputs,
                                 const Selected& result, std::string_view backend = "cpu");

}  // namespace misa::test
