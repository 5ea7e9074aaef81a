// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX-512 with BF16 products, which Highway 1.0 has no target for: the AVX-512
// target with one primitive more. This file alone is compiled with those instructions enabled, so
// it must not instantiate anything of the standard library that other files share.
#include "indexers/cpu_kernels_avx512_bf16.hpp"

#if defined(__AVX512BF16__)

#define MISA_CPU_NAMESPACE cpu_avx512_bf16
#define MISA_NATIVE_BF16 1

#include <immintrin.h>

#include "indexers/cpu_kernels-inl.h"

namespace misa::cpu {

void fill_avx512_bf16_kernels(Kernels& table) {
  cpu_avx512_bf16::HWY_NAMESPACE::FillKernels(table);
}

}  // namespace misa::cpu

#endif
