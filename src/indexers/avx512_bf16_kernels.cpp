// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX-512 with BF16 products, which Highway 1.0 has no target for: its AVX-512
// target and one more instruction. Files of this prefix are compiled with these instructions
// enabled. They must not instantiate templates of the standard library that other files do: the
// linker may keep this copy, which other processors cannot run.
#include "indexers/avx512_bf16_kernels.hpp"

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
