// SPDX-License-Identifier: Apache-2.0
// Runs indexers on generated inputs and checks the results.
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

// Whether all outputs are equal bit for bit.
::testing::AssertionResult same_bits(const Selected& a, const Selected& b);

// Checks every row by the rules of the specification. Each stage is checked on what the backend
// reported of the previous one: the heads against the reference's values for them, the residual row
// for these heads, the scores for these heads and this row, and the set by these scores. Whether a
// position is selected may differ only where its interval (tolerance.hpp) permits both; the width
// of intervals depends on the backend.
::testing::AssertionResult valid(const IndexerConfig& config, const RaggedInputs& inputs,
                                 const Selected& result, std::string_view backend = "cpu");
::testing::AssertionResult valid(const IndexerConfig& config, const PagedInputs& inputs,
                                 const Selected& result, std::string_view backend = "cpu");

}  // namespace misa::test
