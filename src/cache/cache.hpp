// SPDX-License-Identifier: Apache-2.0
// The check that calls reading and writing a paged key cache share.
#pragma once

#include <cstdint>

#include "misa/view.hpp"

namespace misa {

// Checks dim, pages, strides and pointers of a cache; returns the page stride in bytes.
std::int64_t validated_page_stride(const CacheView& cache);

}  // namespace misa
