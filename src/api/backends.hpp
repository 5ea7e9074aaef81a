// SPDX-License-Identifier: Apache-2.0
// The backends of this build, and which of them a name stands for.
#pragma once

#include <span>
#include <string_view>

#include "indexers/backend.hpp"

namespace misa {

// Every backend of this build, by falling priority.
std::span<const Backend* const> all_backends();

// The first of these that this machine can run and that the name stands for: "auto" (then the
// variable MISA_BACKEND names it, where it is set), a family ("cpu", "cuda") or a backend's own
// name. Throws Error, which names the argument or the variable; `place` is where they take arrays.
const Backend& choose_backend(std::span<const Backend* const> from, std::string_view place,
                              std::string_view name);

}  // namespace misa
