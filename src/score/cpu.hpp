// SPDX-License-Identifier: Apache-2.0
// The rows that score keys for one query, for the CPU backend.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"
#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"
#include "cpu/query.hpp"

namespace misa::cpu {

// The most rows into which a residual row is split.
inline constexpr int kMaxResidualRows = 3;

// The active heads, copied to the buffers, then the rows whose sum is the residual row (if there is
// one): rounded to e4m3 with one scale where keys are e4m3 and the row is finite, otherwise the row
// itself.
QueryRows active_rows(const Heads& heads, std::span<const std::int32_t> active,
                      std::span<const float> residual, DType k_dtype, const RowBuffers& buffers);

// The same rows of query t for a rotated sketch of the keys: rotated, then rounded to e4m3 with one
// scale each, which is folded into the row's weight.
QueryRows rotated_rows(const Kernels& kernels, const Problem& problem, std::int64_t t,
                       const Heads& heads, std::span<const std::int32_t> active,
                       std::span<const float> residual, const RowBuffers& buffers);

}  // namespace misa::cpu
