// SPDX-License-Identifier: Apache-2.0
/// \file
/// The whole C++ interface.
#pragma once

#include "misa/cache.hpp"    // IWYU pragma: export
#include "misa/context.hpp"  // IWYU pragma: export
#include "misa/error.hpp"    // IWYU pragma: export
#include "misa/indexer.hpp"  // IWYU pragma: export
#include "misa/types.hpp"    // IWYU pragma: export
#include "misa/view.hpp"     // IWYU pragma: export
