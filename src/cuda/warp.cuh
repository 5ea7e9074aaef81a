// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace misa::cuda {

// The mask of warp functions in which all 32 lanes take part.
inline constexpr unsigned kFullMask = 0xFFFFFFFFU;

}  // namespace misa::cuda
