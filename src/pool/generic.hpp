// SPDX-License-Identifier: Apache-2.0
// Block means for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::pool {

// Bytes of workspace for the block-mean table of sequences that do not overlap. With less memory,
// or where sequences overlap, results are the same but take longer. `partial`: include the partial
// block means of the queries.
std::size_t workspace_bytes(const Shape& shape, const KeyBounds& keys, std::int32_t block,
                            bool partial);

// Fills a table in `workspace` with the means of all whole blocks that queries of `problem` see
// and, if `partial`, with the queries' partial block means. The table has as many rows as there is
// room. `num_sms`: for how many SMs the work is cut.
template <class Source>
BlockMeanTable launch(const ProblemOf<Source>& problem, std::int32_t block, bool partial,
                      std::span<std::byte> workspace, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::pool
