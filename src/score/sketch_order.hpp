// SPDX-License-Identifier: Apache-2.0
// The order in which Hopper multiplies the entries of a sketch. An e4m3 product adds up 32 entries
// in one step, and rounds then, so which ones share a step is part of the result's bits. Keys of a
// cache are expanded in registers (sm90_sketch_paged.cu): a lane of a quad has 32 neighbouring
// entries, of which eight take part in each step, in the order in which they come out of a word of
// codes.
#pragma once

#include "core/sketch.hpp"

namespace misa::cuda::score {

// Where entry d of 128 stands in a row of elements in that order.
constexpr int sketch_position(int sketch, int d) {
  const int lane = d / 32;
  const int step = d % 32 / 8;
  const int i = d % 8;
  const int half = is_rotated(sketch) ? i % 2 : i / 4;
  const int place = is_rotated(sketch) ? i / 2 : i % 4;
  return 32 * step + 16 * half + 4 * lane + place;
}

// 4-bit sketches are expanded to multiples of this times the scale of the key's largest group: so
// the entries of a group whose scale is 2^14 below it are e4m3 numbers too.
inline constexpr float kSketchUnit = 0x1p-6F;

}  // namespace misa::cuda::score
