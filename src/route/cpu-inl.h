// SPDX-License-Identifier: Apache-2.0
// Inner loops of routing on the CPU. Sums over keys are kept per vector lane and reduced once, so
// that their order depends only on the number of keys.

#if defined(MISA_ROUTE_CPU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MISA_ROUTE_CPU_INL_H_
#undef MISA_ROUTE_CPU_INL_H_
#else
#define MISA_ROUTE_CPU_INL_H_
#endif

#include "cpu/kernels.hpp"
#include "cpu/load-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace misa::MISA_CPU_NAMESPACE {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// energy[j] += sum of |w_j * max(0, x)| over the first `valid` keys.
inline void AddEnergy(const float* HWY_RESTRICT dots, std::int64_t stride, int heads, int valid,
                      const float* HWY_RESTRICT weight, float* HWY_RESTRICT energy) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  for (int j = 0; j < heads; ++j) {
    const float* x = dots + j * stride;
    const auto w = hn::Set(d, weight[j]);
    auto sum = hn::Zero(d);
    for (int i = 0; i < valid; i += lanes) {
      const auto mask = hn::FirstN(d, static_cast<size_t>(valid - i));
      const auto term = hn::Abs(hn::Mul(w, hn::Max(hn::Zero(d), hn::LoadU(d, x + i))));
      sum = hn::Add(sum, hn::IfThenElseZero(mask, term));
    }
    energy[j] += hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

// Fits a + p x to r = max(0, x) over `count` keys, one head at a time:
//  1. means, and whether x is constant (then the slope is 0, however the mean is rounded),
//  2. centred second moments, hence p and a,
//  3. the rms of r - a - p x.
inline void Fit(const float* HWY_RESTRICT dots, std::int64_t stride, int heads, int count,
                const cpu::HeadFit& out) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const V zero = hn::Zero(d);
  const float n = static_cast<float>(count);
  const auto total = [&](V v) HWY_ATTR { return hn::GetLane(hn::SumOfLanes(d, v)); };
  for (int j = 0; j < heads; ++j) {
    const float* x_row = dots + j * stride;

    V sum_x = zero;
    V sum_r = zero;
    auto varies = hn::Ne(zero, zero);
    const V first = hn::Set(d, x_row[0]);
    for (int i = 0; i < count; i += lanes) {
      const auto mask = hn::FirstN(d, static_cast<size_t>(count - i));
      const V x = hn::IfThenElse(mask, hn::LoadU(d, x_row + i), first);
      varies = hn::Or(varies, hn::Not(hn::Eq(x, first)));  // NaN varies
      sum_x = hn::Add(sum_x, hn::IfThenElseZero(mask, x));
      sum_r = hn::Add(sum_r, hn::IfThenElseZero(mask, hn::Max(zero, x)));
    }
    const float mean_x = total(sum_x) / n;
    const float mean_r = total(sum_r) / n;

    V sum_xx = zero;
    V sum_xr = zero;
    V sum_rr = zero;
    const V mx = hn::Set(d, mean_x);
    const V mr = hn::Set(d, mean_r);
    for (int i = 0; i < count; i += lanes) {
      const auto mask = hn::FirstN(d, static_cast<size_t>(count - i));
      const V x = hn::LoadU(d, x_row + i);
      const V dx = hn::IfThenElseZero(mask, hn::Sub(x, mx));
      const V dr = hn::IfThenElseZero(mask, hn::Sub(hn::Max(zero, x), mr));
      sum_xx = hn::MulAdd(dx, dx, sum_xx);
      sum_xr = hn::MulAdd(dx, dr, sum_xr);
      sum_rr = hn::MulAdd(dr, dr, sum_rr);
    }
    const bool constant = hn::AllFalse(d, varies);
    const float slope = constant ? 0.0F : total(sum_xr) / total(sum_xx);
    out.slope[j] = slope;
    out.dispersion[j] = constant ? 0.0F : hn::GetLane(hn::Sqrt(hn::Set(d, total(sum_rr) / n)));

    V sum_ee = zero;
    const V p = hn::Set(d, slope);
    for (int i = 0; i < count; i += lanes) {
      const auto mask = hn::FirstN(d, static_cast<size_t>(count - i));
      const V x = hn::LoadU(d, x_row + i);
      const V residual = hn::NegMulAdd(p, hn::Sub(x, mx), hn::Sub(hn::Max(zero, x), mr));
      const V e = hn::IfThenElseZero(mask, residual);
      sum_ee = hn::MulAdd(e, e, sum_ee);
    }
    out.nonlinearity[j] = constant ? 0.0F : hn::GetLane(hn::Sqrt(hn::Set(d, total(sum_ee) / n)));
  }
}

inline float SumSquares(const void* row, DType dtype, float scale, int dim) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  auto sum = hn::Zero(d);
  ForDType(dtype, [&](auto type) HWY_ATTR {
    for (int i = 0; i < dim; i += lanes) {
      const auto value = hn::Mul(hn::Set(d, scale), LoadF32<decltype(type)::value>(d, row, i));
      sum = hn::MulAdd(value, value, sum);
    }
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

inline void AddScaled(float factor, const void* row, DType dtype, int dim,
                      float* HWY_RESTRICT sum) {
  const hn::ScalableTag<float> d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  ForDType(dtype, [&](auto type) HWY_ATTR {
    for (int i = 0; i < dim; i += lanes) {
      const auto value = LoadF32<decltype(type)::value>(d, row, i);
      hn::StoreU(hn::MulAdd(hn::Set(d, factor), value, hn::LoadU(d, sum + i)), d, sum + i);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace misa::MISA_CPU_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
