// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.hpp"

namespace misa::cpu {

// Present where the compiler can target AVX-512 BF16 (MISA_HAVE_AVX512_BF16).
void fill_avx512_bf16_kernels(Kernels& table);

}  // namespace misa::cpu
