// SPDX-License-Identifier: Apache-2.0
// Writing the paged key cache in device memory. Arguments are validated and strides are actual
// ones; the arrays' contents are unknown: what is out of range is skipped.
#pragma once

#include <cstdint>

#include "misa/cache.hpp"

namespace misa::cuda::cache {

// keys.data is null if the keys' bytes stand in the cache already; slots [keys.tokens].
void launch_append(const CacheSpan& cache, const NewKeys& keys, const std::int64_t* slots,
                   ScaleFormat format, void* stream);

// from [count], to [count].
void launch_copy(const CacheView& source, const std::int32_t* from, const CacheSpan& target,
                 const std::int32_t* to, std::int64_t count, void* stream);

// pages [count]; filled [count] or null: every token counts.
void launch_rebuild(const CacheSpan& cache, const std::int32_t* pages, const std::int32_t* filled,
                    std::int64_t count, void* stream);

}  // namespace misa::cuda::cache
