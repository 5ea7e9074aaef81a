// SPDX-License-Identifier: Apache-2.0
// What callers bring, checked once at the public interface: whatever passes here may be computed
// without reading or writing out of bounds.
#pragma once

#include <cstddef>
#include <span>

#include "misa/indexer.hpp"

namespace misa {

// A choice of indexer against the shape that it is planned for.
void validate(const IndexerConfig& config, const Shape& shape);

// The inputs of a call, strides resolved.
Queries validated(const Queries& q);
Weights validated(const Weights& w, const Queries& q);
RaggedKeys validated(const RaggedKeys& k, const Queries& q);
PagedKeys validated(const PagedKeys& k, const Queries& q);
RaggedMeans validated(const RaggedMeans& means, const Queries& q);

// The same without a look at what the arrays hold, which may lie in device memory.
RaggedKeys validated_layout(const RaggedKeys& k, const Queries& q);
RaggedMeans validated_layout(const RaggedMeans& means, const Queries& q);

// The shape of a validated call.
Shape shape_of(const Queries& q, const RaggedKeys& k);
Shape shape_of(const Queries& q, const PagedKeys& k);

// That a call's shape is one that was planned.
void validate_planned(const Shape& call, const Shape& planned);

// That the outputs hold what is written, and are asked for only where they exist.
void validate(const Selection& out, const IndexerConfig& config, const Queries& q);

// The sizes of a call on block means.
void validate_means_sizes(std::int64_t tokens, std::int64_t dim, std::int64_t count);

// What is asked of block means, and that the output holds it.
void validate_routed_heads(int heads, std::span<const std::int32_t> out, const Queries& q);
void validate_kept_blocks(int filter_blocks, std::span<const std::int32_t> out, const Queries& q);

void validate_workspace(std::span<const std::byte> workspace, std::size_t bytes);

}  // namespace misa
