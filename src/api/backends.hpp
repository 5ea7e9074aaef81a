// SPDX-License-Identifier: Apache-2.0
// The backends of this build, and the choice of one by name.
#pragma once

#include <span>
#include <string_view>

#include "indexers/backend.hpp"

namespace misa {

// Every backend of this build, in order of decreasing priority.
std::span<const Backend* const> all_backends();

// The first backend of `from` that this machine can run and that matches `name`: "auto" (replaced
// by the value of the variable MISA_BACKEND if that is set), a family ("cpu", "cuda") or a
// backend's own name. Throws Error otherwise; its message says that these backends are for arrays
// in `place`.
const Backend& choose_backend(std::span<const Backend* const> from, std::string_view place,
                              std::string_view name);

}  // namespace misa
