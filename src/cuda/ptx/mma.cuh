// SPDX-License-Identifier: Apache-2.0
// The matrix product of a warp, mma.sync (compute capability 8.0 and above), and a maximum that
// propagates NaN.
#pragma once

#include <cstdint>

namespace misa::cuda {

// D[16, 8] += A[16, 16] B[16, 8] in bf16 or fp16 with fp32 accumulators. With g = lane / 4 and c =
// lane % 4 a lane holds: a[0] = A[g, 2c..], a[1] = A[g + 8, 2c..], a[2] = A[g, 2c + 8..], a[3] =
// A[g + 8, 2c + 8..]; b[0] = B[2c.., g], b[1] = B[2c + 8.., g]; d[0..1] = D[g, 2c..], d[2..3] = D[g
// + 8, 2c..].
__device__ inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_fp16(float (&d)[4], const std::uint32_t (&a)[4],
                                const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The larger of two values; NaN if one of them is.
__device__ inline float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

}  // namespace misa::cuda
