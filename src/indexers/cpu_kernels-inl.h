// SPDX-License-Identifier: Apache-2.0
// The inner loops of all stages for one instruction set, and its table of them.

#if defined(MISA_INDEXERS_CPU_KERNELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MISA_INDEXERS_CPU_KERNELS_INL_H_
#undef MISA_INDEXERS_CPU_KERNELS_INL_H_
#else
#define MISA_INDEXERS_CPU_KERNELS_INL_H_
#endif

#include "cpu/load-inl.h"
#include "pool/cpu-inl.h"
#include "route/cpu-inl.h"
#include "score/cpu-inl.h"
#include "select/cpu-inl.h"

HWY_BEFORE_NAMESPACE();
namespace misa::MISA_CPU_NAMESPACE {
namespace HWY_NAMESPACE {

inline void FillKernels(cpu::Kernels& table) {
  table.native_bf16 = MISA_NATIVE_BF16;
  table.convert = Convert;
  table.pack = Pack;
  table.add_keys = AddKeys;
  table.add = Add;
  table.score = Score;
  table.dots = Dots;
  table.add_energy = AddEnergy;
  table.fit = Fit;
  table.sum_squares = SumSquares;
  table.add_scaled = AddScaled;
  table.offer = Offer;
  table.compact = Compact;
}

}  // namespace HWY_NAMESPACE
}  // namespace misa::MISA_CPU_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
