// SPDX-License-Identifier: Apache-2.0
// Two queries over three keys that lie along three axes: each selects its two best positions.
#include <cstdint>
#include <vector>

#include "misa/misa.hpp"

int main() {
  constexpr int kDim = 64;
  std::vector<float> q(2 * kDim);
  q[0] = 1, q[1] = 2, q[2] = 3;  // query 0 prefers the later axes
  q[kDim] = 3, q[kDim + 1] = 2;  // query 1 the earlier ones
  const std::vector<float> w{1, 1};
  std::vector<float> k(3 * kDim);
  for (int s = 0; s < 3; ++s) {
    k[s * kDim + s] = 1;
  }
  const std::vector<std::int32_t> ks{0, 0};
  const std::vector<std::int32_t> ke{3, 3};

  misa::IndexerConfig config = misa::IndexerConfig::dsa(2);
  config.ordered = true;
  const misa::Selected selected =
      misa::select(misa::Context(), config, {q.data(), misa::DType::f32, 2, 1, kDim},
                   {w.data(), 2, 1}, {k.data(), misa::DType::f32, 3, kDim, 0, nullptr, ks, ke});
  return selected.indices == std::vector<std::int32_t>{1, 2, 0, 1} ? 0 : 1;
}
