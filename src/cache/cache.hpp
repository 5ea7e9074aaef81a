// SPDX-License-Identifier: Apache-2.0
// The checks that calls reading and writing a paged key cache share.
#pragma once

#include <cstdint>

#include "misa/cache.hpp"
#include "misa/view.hpp"

namespace misa {

// Checks the sizes, strides and pointers of a cache, without reading it; returns it with the actual
// strides in place of default ones.
CacheView validated(const CacheView& cache);

// Checks that kernels can read and write the sketch of a validated cache in words of 16 bytes.
void require_device_sketch(const CacheView& cache);

CacheView view_of(const CacheSpan& cache);

// The stride of new keys for a cache of this D, in elements. Does not read them.
std::int64_t validated_token_stride(const NewKeys& k, std::int64_t dim);

// Checks that the derived data of one cache can be copied to the other, page by page.
void validate_copy(const CacheView& source, const CacheView& target, std::size_t from,
                   std::size_t to);

void validate(ScaleFormat format);

}  // namespace misa
