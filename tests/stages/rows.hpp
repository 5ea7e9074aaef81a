// SPDX-License-Identifier: Apache-2.0
// Rows for the tests of the reference's stages.
#pragma once

#include "core/row.hpp"
#include "support/inputs.hpp"

namespace misa::test {

// One query over n random keys, in double.
inline reference::Row random_row(std::int64_t n, std::int64_t heads = 4, std::uint64_t seed = 1) {
  PackSpec spec;
  spec.sequences = {{n, 1}};
  spec.heads = heads;
  spec.seed = seed;
  const RaggedInputs inputs(make_pack(spec));
  const IndexerConfig config;
  const Rows all = inputs.all();
  return reference::load_row({config, inputs.q(all), inputs.w(all), source_of(inputs.k(all)), {}},
                             0);
}

}  // namespace misa::test
