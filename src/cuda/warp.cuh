// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace misa::cuda {

// Every lane of a warp takes part.
inline constexpr unsigned kFullMask = 0xFFFFFFFFU;

}  // namespace misa::cuda
