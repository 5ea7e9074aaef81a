// SPDX-License-Identifier: Apache-2.0
// The tables of inner loops, one per instruction set, and which of them this machine can run.
#include "cpu/kernels.hpp"

// SVE's vectors have no size at compile time and so cannot be held in arrays; processors with SSSE3
// but without SSE4 are no longer in use.
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#define MISA_CPU_NAMESPACE cpu
#define MISA_NATIVE_BF16 0

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "indexers/cpu_kernels.cpp"  // this file, which is compiled per target
#include "hwy/foreach_target.h"                        // must come before highway.h
#include "hwy/highway.h"

#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
#include "indexers/cpu_kernels-inl.h"
#endif

#if HWY_ONCE

#include <vector>

#include "indexers/avx512_bf16_kernels.hpp"

namespace misa::cpu {
namespace {

#if HWY_ARCH_X86
bool has(std::uint64_t target) {
  return (static_cast<std::uint64_t>(hwy::SupportedTargets()) & target) != 0;
}
#endif

Kernels named(const char* name, const char* isa, const char* requirement, int priority,
              bool (*available)(), void (*fill)(Kernels&)) {
  Kernels table{};
  table.name = name;
  table.isa = isa;
  table.requirement = requirement;
  table.priority = priority;
  table.available = available;
  fill(table);
  return table;
}

std::vector<Kernels> make_tables() {
  std::vector<Kernels> tables;
#if MISA_HAVE_AVX512_BF16
  tables.push_back(named(
      "cpu-avx512-bf16", "AVX-512 BF16", "an x86-64 processor with AVX-512 and BF16", 40,
      [] { return has(HWY_AVX3) && __builtin_cpu_supports("avx512bf16") != 0; },
      fill_avx512_bf16_kernels));
#endif
#if HWY_TARGETS & HWY_AVX3
  tables.push_back(named(
      "cpu-avx512", "AVX-512", "an x86-64 processor with AVX-512", 30, [] { return has(HWY_AVX3); },
      N_AVX3::FillKernels));
#endif
#if HWY_TARGETS & HWY_AVX2
  tables.push_back(named(
      "cpu-avx2", "AVX2", "an x86-64 processor with AVX2 and FMA", 20, [] { return has(HWY_AVX2); },
      N_AVX2::FillKernels));
#endif
#if HWY_TARGETS & HWY_SSE4
  tables.push_back(named(
      "cpu-sse4", "SSE4", "an x86-64 processor with SSE4", 10, [] { return has(HWY_SSE4); },
      N_SSE4::FillKernels));
#endif
#if HWY_TARGETS & HWY_NEON
  tables.push_back(named(
      "cpu-neon", "NEON", "an Arm processor with NEON", 20, [] { return true; },
      N_NEON::FillKernels));
#endif
  return tables;
}

}  // namespace

std::span<const Kernels* const> kernels() {
  static const std::vector<Kernels> tables = make_tables();
  static const std::vector<const Kernels*> pointers = [] {
    std::vector<const Kernels*> list;
    for (const Kernels& table : tables) {
      list.push_back(&table);
    }
    return list;
  }();
  return pointers;
}

}  // namespace misa::cpu

#endif  // HWY_ONCE
