// SPDX-License-Identifier: Apache-2.0
// Arguments are checked once, at the public interface. A call that passes these checks reads and
// writes nothing out of bounds.
#pragma once

#include <cstddef>
#include <span>

#include "misa/indexer.hpp"

namespace misa {

// Checks a configuration against the shape that it is planned for.
void validate(const IndexerConfig& config, const Shape& shape);

// Check the inputs of a call and return them with every stride of 0 replaced by the dense one.
Queries validated(const Queries& q);
Weights validated(const Weights& w, const Queries& q);
RaggedKeys validated(const RaggedKeys& k, const Queries& q);
PagedKeys validated(const PagedKeys& k, const Queries& q);
RaggedMeans validated(const RaggedMeans& means, const Queries& q);

// The same without reading the arrays, which may be in device memory.
RaggedKeys validated_layout(const RaggedKeys& k, const Queries& q);
PagedKeys validated_layout(const PagedKeys& k, const Queries& q);
RaggedMeans validated_layout(const RaggedMeans& means, const Queries& q);

// How many sequences a call has.
std::int64_t batch_of(const PagedKeys& k, const Queries& q);

// The shape of a validated call.
Shape shape_of(const Queries& q, const RaggedKeys& k);
Shape shape_of(const Queries& q, const PagedKeys& k);

// Checks that a call does not exceed the planned shape.
void validate_planned(const Shape& call, const Shape& planned);

// Checks that each output has the right size, and is empty if the configuration does not have it.
// `cache`: that of paged keys, or null.
Selection validated(const Selection& out, const IndexerConfig& config, const Queries& q,
                    const CacheView* cache);

// The cache of a call's keys; null if they are ragged.
inline const CacheView* cache_of(const RaggedKeys& /*k*/) { return nullptr; }
inline const CacheView* cache_of(const PagedKeys& k) { return &k.cache; }

// Checks the sizes of a call on block means.
void validate_means_sizes(std::int64_t tokens, std::int64_t dim, std::int64_t count);

// Check the number of heads or blocks of a call on block means, and the size of its output.
void validate_routed_heads(int heads, std::span<const std::int32_t> out, const Queries& q);
void validate_kept_blocks(int filter_blocks, std::span<const std::int32_t> out, const Queries& q);

void validate_workspace(std::span<const std::byte> workspace, std::size_t bytes);

}  // namespace misa
