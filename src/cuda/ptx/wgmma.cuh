// SPDX-License-Identifier: Apache-2.0
// Warpgroup matrix products of Hopper (wgmma): D[64, N] (+)= A[64, 32] B[N, 32]^T in e4m3 with fp32
// accumulators, B in shared memory and A there or in registers; and the same in fp16 with A in
// registers.
//
// Accumulators: thread i of the warpgroup holds, for every group j of eight columns, the elements
// (row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1) as d[4 j] … d[4 j +
// 3], row = 16 (i / 32) + (i % 32) / 4, column = 8 j + 2 (i % 4).
#pragma once

#include <cstdint>

namespace misa::cuda {

// The descriptor of a tile of 128-byte rows in shared memory, 1024-byte aligned and swizzled:
// 16-byte chunk c of row r is stored as chunk c ^ (r % 8). Groups of 8 rows are 1024 bytes apart.
// Adding 2 to a descriptor advances it by 32 bytes in every row.
__device__ inline std::uint64_t swizzled_tile(const void* tile) {
  const auto address = static_cast<std::uint64_t>(__cvta_generic_to_shared(tile));
  return (address & 0x3FFFF) >> 4 | std::uint64_t{1} << 16 | std::uint64_t{1024 >> 4} << 32 |
         std::uint64_t{1} << 62;
}

// Required before the first product, and after registers of an accumulator were read or written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` committed groups are unfinished.
template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving reads of an accumulator before the wait, or writes after it.
template <int count>
__device__ inline void wgmma_pin(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    asm volatile("" : "+f"(d[i])::"memory");
  }
}

template <int columns>
__device__ void wgmma_e4m3(float (&d)[columns / 2], std::uint64_t a, std::uint64_t b, bool add);

#define MISA_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MISA_D8(i) MISA_D4(i), MISA_D4((i) + 4)

template <>
__device__ inline void wgmma_e4m3<16>(float (&d)[8], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, %8, %9, add, 1, 1;\n}\n"
      : MISA_D8(0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

template <>
__device__ inline void wgmma_e4m3<32>(float (&d)[16], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, %16, %17, add, 1, 1;\n}\n"
      : MISA_D8(0), MISA_D8(8)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

template <>
__device__ inline void wgmma_e4m3<64>(float (&d)[32], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, add, 1, 1;\n}\n"
      : MISA_D8(0), MISA_D8(8), MISA_D8(16), MISA_D8(24)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

template <>
__device__ inline void wgmma_e4m3<128>(float (&d)[64], std::uint64_t a, std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, add, 1, 1;\n}\n"
      : MISA_D8(0), MISA_D8(8), MISA_D8(16), MISA_D8(24), MISA_D8(32), MISA_D8(40), MISA_D8(48),
        MISA_D8(56)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// The same with A in registers, 16 rows per warp: thread i has the elements 4 (i % 4) … 4 (i % 4) +
// 3 of row (i % 32) / 4 in a[0] and of the row 8 below in a[1], and those 16 further in a[2] and
// a[3].
template <int columns>
__device__ void wgmma_e4m3(float (&d)[columns / 2], const std::uint32_t (&a)[4], std::uint64_t b,
                           bool add);

template <>
__device__ inline void wgmma_e4m3<16>(float (&d)[8], const std::uint32_t (&a)[4], std::uint64_t b,
                                      bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7"
      "}, {%8, %9, %10, %11}, %12, add, 1, 1;\n}\n"
      : MISA_D8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

template <>
__device__ inline void wgmma_e4m3<32>(float (&d)[16], const std::uint32_t (&a)[4], std::uint64_t b,
                                      bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, add, 1, 1;\n}\n"
      : MISA_D8(0), MISA_D8(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

template <>
__device__ inline void wgmma_e4m3<64>(float (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b,
                                      bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, add, 1, 1;\n}\n"
      : MISA_D8(0), MISA_D8(8), MISA_D8(16), MISA_D8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

// D[64, N] (+)= A[64, 16] B[N, 16]^T in fp16 with fp32 accumulators. A is in registers, 16 rows per
// warp, laid out as for mma_fp16.
template <int columns>
__device__ void wgmma_fp16(float (&d)[columns / 2], const std::uint32_t (&a)[4], std::uint64_t b,
                           bool add);

template <>
__device__ inline void wgmma_fp16<64>(float (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b,
                                      bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"
      : MISA_D8(0), MISA_D8(8), MISA_D8(16), MISA_D8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

template <>
__device__ inline void wgmma_fp16<128>(float (&d)[64], const std::uint32_t (&a)[4], std::uint64_t b,
                                       bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}\n"
      : MISA_D8(0), MISA_D8(8), MISA_D8(16), MISA_D8(24), MISA_D8(32), MISA_D8(40), MISA_D8(48),
        MISA_D8(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

#undef MISA_D8
#undef MISA_D4

}  // namespace misa::cuda
