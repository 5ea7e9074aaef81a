// SPDX-License-Identifier: Apache-2.0
// The sketches of ragged keys, which no cache holds.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda::score {

// Writes the sketches of all keys, as those of one page of L keys (core/sketch.hpp). One launch per
// call is enough for all of its queries.
void launch_sketches(const DeviceRaggedSource& keys, int sketch, std::int64_t dim,
                     std::uint8_t* out, void* stream);

}  // namespace misa::cuda::score
