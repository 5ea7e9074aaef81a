// SPDX-License-Identifier: Apache-2.0
// The table of AVX-512 BF16.
#pragma once

#include "cpu/kernels.hpp"

namespace misa::cpu {

// Defined where the compiler can target AVX-512 BF16 (MISA_HAVE_AVX512_BF16).
void fill_avx512_bf16_kernels(Kernels& table);

}  // namespace misa::cpu
