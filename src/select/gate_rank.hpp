// SPDX-License-Identifier: Apache-2.0
// The rank of the gate threshold in a sample of a row's scores, and a bound on how many scores pass
// it. For host and device code.
#pragma once

#include <cmath>
#include <cstdint>

namespace misa::cuda::select {

// A count is assumed to stay below its mean plus 4.5 standard deviations, which a normal variable
// exceeds a few times in a million.
inline constexpr float kDeviations = 4.5F;

// Counts here are nearly Poisson variables, whose upper tail is longer than a normal one, by (4.5^2
// - 1) / 6 in the Cornish-Fisher expansion. Without this term, a count of mean 32 would exceed the
// bound 16 times in a million.
inline constexpr float kSkew = (kDeviations * kDeviations - 1) / 6;

// The bound that a count of this mean and variance exceeds only a few times in a million.
template <class Real>
constexpr Real upper_count(Real mean, Real variance) {
  return mean + kDeviations * std::sqrt(variance) + kSkew;
}

// The rank of the gate threshold (from 1, the largest first) at which a row's top k pass, in a
// sample without replacement of `sampled` of the row's `keys` scores. On average the sample holds
// top_k * sampled / keys of the top k. 1 <= top_k <= keys.
template <class Real>
constexpr std::uint32_t threshold_rank(std::uint32_t sampled, std::uint32_t keys,
                                       std::uint32_t top_k) {
  const Real wanted_share = static_cast<Real>(top_k) / static_cast<Real>(keys);
  const Real sampled_share = static_cast<Real>(sampled) / static_cast<Real>(keys);
  const Real mean = wanted_share * static_cast<Real>(sampled);
  const Real variance = mean * (1 - wanted_share) * std::fmax(Real{0}, 1 - sampled_share);
  // One more, as the score at the threshold does not exceed it.
  return static_cast<std::uint32_t>(std::ceil(upper_count(mean, variance))) + 1;
}

}  // namespace misa::cuda::select
