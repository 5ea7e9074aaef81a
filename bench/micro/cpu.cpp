// SPDX-License-Identifier: Apache-2.0
// The floor of scoring on the CPU: products of registers and nothing else, by one thread and by as
// many as a context has. VDPBF16PS where the processor has it, or else multiply-adds of floats.
// Prints JSON: medians of 9 runs in GFLOP/s, the least and the greatest.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <vector>

#include "cpu/threads.hpp"

namespace {

constexpr std::int64_t kSteps = 4'000'000;
constexpr int kRuns = 9;

// 12 accumulators, so that no product waits for the one before it; the other two registers are 0.
// An assembler's loop, so that the compiler leaves no product out.
constexpr double kProducts = 12.0 * kSteps;

double bf16_products() {
  asm volatile("vzeroall" ::: "memory");
  for (std::int64_t i = 0; i < kSteps; ++i) {
    asm volatile(
        ".irp sum,0,1,2,3,4,5,6,7,8,9,10,11\n"
        "vdpbf16ps %%zmm12, %%zmm13, %%zmm\\sum\n"
        ".endr" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11", "xmm12", "xmm13");
  }
  return 64 * kProducts;  // FLOP
}

double f32_products() {
  asm volatile("vzeroall" ::: "memory");
  for (std::int64_t i = 0; i < kSteps; ++i) {
    asm volatile(
        ".irp sum,0,1,2,3,4,5,6,7,8,9,10,11\n"
        "vfmadd231ps %%ymm12, %%ymm13, %%ymm\\sum\n"
        ".endr" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
              "xmm10", "xmm11", "xmm12", "xmm13");
  }
  return 16 * kProducts;
}

// GFLOP/s of all threads together, sorted.
std::vector<double> rates(int threads, double (*products)()) {
  const misa::Threads pool(threads);
  std::vector<double> found;
  for (int run = -1; run < kRuns; ++run) {  // the first is not counted
    std::vector<double> flops(static_cast<std::size_t>(threads));
    const auto start = std::chrono::steady_clock::now();
    pool.for_each(threads, [&](std::int64_t i, int) { flops[i] = products(); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (run >= 0) {
      double all = 0;
      for (const double each : flops) {
        all += each;
      }
      found.push_back(1e-9 * all / seconds.count());
    }
  }
  std::ranges::sort(found);
  return found;
}

}  // namespace

int main() {
  const bool bf16 = __builtin_cpu_supports("avx512bf16") != 0;
  if (!bf16 && __builtin_cpu_supports("fma") == 0) {
    fmt::print(stderr, "misa_micro_cpu: the processor has neither AVX-512 BF16 nor FMA\n");
    return 1;
  }
  const auto products = bf16 ? bf16_products : f32_products;
  const std::vector<double> one = rates(1, products);
  const std::vector<double> all = rates(misa::default_threads(), products);
  const nlohmann::ordered_json out{{"instruction", bf16 ? "VDPBF16PS" : "VFMADD231PS"},
                                   {"threads", misa::default_threads()},
                                   {"gflops_one_thread", one[kRuns / 2]},
                                   {"gflops_one_thread_low", one.front()},
                                   {"gflops_one_thread_high", one.back()},
                                   {"gflops", all[kRuns / 2]},
                                   {"gflops_low", all.front()},
                                   {"gflops_high", all.back()}};
  fmt::print("{}\n", out.dump(2));
  return 0;
}
