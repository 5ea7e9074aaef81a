// SPDX-License-Identifier: Apache-2.0
// Times selection on the device: the stand-alone selector, and the two stages around fused scoring.
//
// A figure is the median of 30 samples of 10 consecutive launches, with the 10th and 90th
// percentile. The floor is the time to read every input once and write every output once at the
// rate of a device copy, which is measured first. Inputs that fit into the L2 cache stay there
// between launches.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/check.cuh"
#include "gpu/device.hpp"
#include "misa/cuda.hpp"
#include "select/gate.hpp"

namespace {

using misa::bench::Device;
using misa::cuda::check;

struct Time {
  double us;
  double low;
  double high;
};

Time measure(const std::function<void()>& launch) {
  constexpr int kSamples = 30;
  constexpr int kLaunches = 10;
  cudaEvent_t start = nullptr;
  cudaEvent_t stop = nullptr;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  for (int i = 0; i < kLaunches; ++i) {
    launch();
  }
  std::vector<double> us;
  for (int i = 0; i < kSamples; ++i) {
    check(cudaEventRecord(start), "cudaEventRecord");
    for (int j = 0; j < kLaunches; ++j) {
      launch();
    }
    check(cudaEventRecord(stop), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
    us.push_back(1000.0 * ms / kLaunches);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::sort(us.begin(), us.end());
  return {us[kSamples / 2], us[kSamples / 10], us[kSamples - 1 - kSamples / 10]};
}

class Report {
 public:
  Report(bool json, double bytes_per_us) : json_(json), bytes_per_us_(bytes_per_us) {
    if (json_) {
      fmt::print("[");
    } else {
      fmt::print("{:<34} {:>9} {:>19} {:>8} {:>9}\n", "", "us", "10 % - 90 %", "GB/s", "of floor");
    }
  }
  void add(const std::string& name, double bytes, const Time& time) {
    const double floor = bytes / bytes_per_us_ / time.us;
    if (json_) {
      fmt::print(
          "{}\n  {{\"name\": \"{}\", \"us\": {:.2f}, \"us_low\": {:.2f}, \"us_high\": {:.2f}, "
          "\"bytes\": {:.0f}, \"of_floor\": {:.3f}}}",
          first_ ? "" : ",", name, time.us, time.low, time.high, bytes, floor);
    } else {
      fmt::print("{:<34} {:>9.1f} {:>9.1f} - {:>7.1f} {:>8.0f} {:>8.0f}%\n", name, time.us,
                 time.low, time.high, bytes / time.us / 1000, 100 * floor);
    }
    std::fflush(stdout);
    first_ = false;
  }
  void end() const { fmt::print("{}", json_ ? "\n]\n" : ""); }

 private:
  bool json_;
  double bytes_per_us_;
  bool first_ = true;
};

// Bytes read and written per microsecond.
double copy_rate() {
  constexpr std::int64_t kBytes = std::int64_t{1} << 30;
  const Device<std::uint8_t> from(kBytes);
  const Device<std::uint8_t> to(kBytes);
  const Time time = measure([&] {
    check(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice),
          "cudaMemcpyAsync");
  });
  return 2.0 * kBytes / time.us;
}

std::vector<float> normal(std::int64_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> distribution;
  std::vector<float> values(count);
  std::generate(values.begin(), values.end(), [&] { return distribution(random); });
  return values;
}

// A prime, so that no two rows start at the same value.
constexpr std::int64_t kNormals = 4'000'037;

void time_top_k(Report& report, const std::vector<float>& normals, std::int64_t rows,
                std::int64_t columns, int top_k) {
  Device<float> scores(rows * columns);
  scores.fill(normals);
  const Device<std::int32_t> indices(rows * top_k);
  const Device<float> values(rows * top_k);
  for (float* out : {static_cast<float*>(nullptr), values.data()}) {
    const Time time = measure([&] {
      misa::cuda::top_k({scores.data(), rows, columns}, top_k, {indices.data(), out}, nullptr);
    });
    report.add(fmt::format("top_k {} x {}, k {}{}", rows, columns, top_k,
                           out != nullptr ? ", scores" : ""),
               static_cast<double>(scores.bytes() + indices.bytes() * (out != nullptr ? 2 : 1)),
               time);
  }
}

constexpr std::int64_t kRows = 2048;

// The ranges of kRows queries that see `columns` keys each, and their fallback rows.
struct Queries {
  explicit Queries(std::int64_t columns)
      : starts(std::vector<std::int32_t>(kRows, 0)),
        ends(std::vector<std::int32_t>(kRows, static_cast<std::int32_t>(columns))),
        fallback_rows(kRows),
        fallback_count(std::vector<std::uint32_t>{0}),
        finished_splits(kRows) {
    keys.tokens = columns;
    keys.starts = starts.data();
    keys.ends = ends.data();
    keys.max_keys = std::numeric_limits<std::int32_t>::max();
    fallback = {fallback_rows.data(), fallback_count.data(), finished_splits.data()};
  }

  Device<std::int32_t> starts;
  Device<std::int32_t> ends;
  Device<std::int32_t> fallback_rows;
  Device<std::uint32_t> fallback_count;
  Device<std::uint32_t> finished_splits;
  misa::cuda::DeviceRaggedSource keys{};
  misa::cuda::select::FallbackRows fallback{};
};

void time_threshold(Report& report, const std::vector<float>& normals, std::int64_t columns,
                    std::int64_t samples, int top_k) {
  const Queries queries(columns);
  Device<float> scores(kRows * samples);
  scores.fill(normals);
  const Device<float> thresholds(kRows);
  const Time time = measure([&] {
    misa::cuda::select::launch_threshold({scores.data(), samples, samples}, queries.keys, kRows,
                                         top_k, thresholds.data(), queries.fallback, nullptr);
  });
  report.add(fmt::format("threshold {} x {}, n {}, k {}", kRows, samples, columns, top_k),
             static_cast<double>(scores.bytes() + thresholds.bytes()), time);
}

// As many candidates as typically pass the threshold. Runs of 64 positions are assigned to the
// lists in turn; each list is in random order.
void time_survivors(Report& report, std::int64_t columns, int top_k, std::int64_t lists,
                    std::int64_t capacity) {
  const Queries queries(columns);
  const std::int64_t list_count = (top_k <= 2048 ? 3300 : top_k <= 4096 ? 5750 : 10000) / lists;
  std::mt19937 random(2);
  std::exponential_distribution<float> tail(2.0F);
  std::vector<misa::cuda::Candidate> row(lists * capacity);
  for (std::int64_t list = 0; list < lists; ++list) {
    for (std::int64_t i = 0; i < list_count; ++i) {
      // Evenly spaced among the positions of the list, so that they are distinct.
      const std::int64_t offset = i * (columns / lists) / list_count;
      const std::int64_t position = offset / 64 * 64 * lists + list * 64 + offset % 64;
      row[list * capacity + i] = {1.7F + tail(random), static_cast<std::uint32_t>(position)};
    }
    const auto first = row.begin() + list * capacity;
    std::shuffle(first, first + list_count, random);
  }
  Device<misa::cuda::Candidate> entries(kRows * lists * capacity);
  entries.fill(row);
  const Device<std::uint32_t> counts(
      std::vector<std::uint32_t>(kRows * lists, static_cast<std::uint32_t>(list_count)));
  const Device<std::int32_t> indices(kRows * top_k);
  const misa::cuda::Candidates candidates{entries.data(), counts.data(),
                                          static_cast<std::uint32_t>(lists),
                                          static_cast<std::uint32_t>(capacity)};
  const Time time = measure([&] {
    misa::cuda::select::launch_survivors(candidates, queries.keys, kRows, top_k,
                                         {indices.data(), nullptr}, true, queries.fallback,
                                         nullptr);
  });
  const double read = static_cast<double>(kRows * lists) * static_cast<double>(list_count * 8 + 4);
  report.add(
      fmt::format("survivors {} x {}, n {}, k {}", kRows, lists * list_count, columns, top_k),
      read + static_cast<double>(indices.bytes()), time);
}

void run(bool json) {
  Report report(json, copy_rate());
  const std::vector<float> normals = normal(kNormals);
  time_top_k(report, normals, 1, 131072, 2048);
  time_top_k(report, normals, 1, 1048576, 2048);
  time_top_k(report, normals, 4, 131072, 2048);
  time_top_k(report, normals, 16, 131072, 2048);
  time_top_k(report, normals, 64, 32768, 2048);
  time_top_k(report, normals, 64, 131072, 2048);
  time_top_k(report, normals, 64, 131072, 8192);
  time_top_k(report, normals, 64, 131072, 16384);
  time_top_k(report, normals, 1024, 65536, 2048);
  time_top_k(report, normals, 2048, 65536, 2048);
  time_top_k(report, normals, 2048, 131072, 2048);
  time_top_k(report, normals, 2048, 65536, 8192);
  time_top_k(report, normals, 2048, 8192, 2048);
  time_threshold(report, normals, 65536, 2048, 2048);
  time_threshold(report, normals, 131072, 2048, 2048);
  time_threshold(report, normals, 131072, 4096, 2048);
  time_survivors(report, 65536, 2048, 4, 1760);
  time_survivors(report, 65536, 2048, 1, 4900);
  time_survivors(report, 131072, 2048, 4, 1760);
  time_survivors(report, 65536, 4096, 4, 2200);
  time_survivors(report, 65536, 8192, 4, 3400);
  report.end();
}

}  // namespace

int main(int argc, char** argv) {
  const bool json = argc == 2 && std::string_view(argv[1]) == "--json";
  if (argc > 1 && !json) {
    fmt::print(stderr, "usage: {} [--json]\n", argv[0]);
    return 2;
  }
  try {
    run(json);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
