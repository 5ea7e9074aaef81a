// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <misa/misa.hpp>

int main() {
  const std::vector<float> q(4 * 64 * 128, 0.1F), w(4 * 64, 0.01F), k(9000 * 128, 0.2F);
  const std::vector<std::int32_t> ks(4, 0), ke{8997, 8998, 8999, 9000};
  const misa::Context context;  // the fastest backend of this machine
  const misa::Selected out =
      misa::select(context, misa::IndexerConfig::misa(/*top_k=*/2048, /*heads=*/8),
                   {q.data(), misa::DType::f32, 4, 64, 128}, {w.data(), 4, 64},
                   {k.data(), misa::DType::f32, 9000, 128, 0, nullptr, ks, ke});
  std::printf("query 0 attends to positions %d ... %d\n", out.indices[0], out.indices[2047]);
}
