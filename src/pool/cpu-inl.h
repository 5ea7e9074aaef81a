// SPDX-License-Identifier: Apache-2.0
// Sums of keys on the CPU, in a fixed order: keys of a page in order, then pages in order, with one
// rounding for scale * element and one for the addition.

#if defined(MISA_POOL_CPU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MISA_POOL_CPU_INL_H_
#undef MISA_POOL_CPU_INL_H_
#else
#define MISA_POOL_CPU_INL_H_
#endif

#include "cpu/kernels.hpp"
#include "cpu/load-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace misa::MISA_CPU_NAMESPACE {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline void AddKeys(const void* const* rows, const float* scale, DType dtype, int count, int dim,
                    float* HWY_RESTRICT sum) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  ForDType(dtype, [&](auto type) HWY_ATTR {
    for (int i = 0; i < dim; i += lanes) {
      auto total = hn::LoadU(d, sum + i);
      for (int key = 0; key < count; ++key) {
        const auto value = LoadF32<decltype(type)::value>(d, rows[key], i);
        total = hn::Add(total, hn::Mul(hn::Set(d, scale[key]), value));
      }
      hn::StoreU(total, d, sum + i);
    }
  });
}

inline void Add(const float* HWY_RESTRICT addend, int dim, float* HWY_RESTRICT sum) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int i = 0; i < dim; i += lanes) {
    hn::StoreU(hn::Add(hn::LoadU(d, sum + i), hn::LoadU(d, addend + i)), d, sum + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace misa::MISA_CPU_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
