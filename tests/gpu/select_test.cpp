// SPDX-License-Identifier: Apache-2.0
// Selection on the device against a sort of entries on the host. All results must be equal bit for
// bit: selection rounds nothing.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "core/entry.hpp"
#include "cuda/check.cuh"
#include "misa/cuda.hpp"
#include "select/gate.hpp"
#include "select/generic.hpp"
#include "support/adversarial.hpp"

namespace misa::test {
namespace {

using cuda::check;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Guard elements before and after every array. Around scores they are +inf, so that a kernel that
// reads one selects it; around outputs they must not change.
constexpr std::int64_t kGuard = 1024;

bool have_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// An array in device memory between guards, which starts `shift` elements after a boundary of 256
// bytes.
template <class T>
class Device {
 public:
  Device(std::span<const T> values, T guard, std::int64_t shift = 0)
      : size_(std::ssize(values)), front_(kGuard + shift), guard_(guard) {
    std::vector<T> all(static_cast<std::size_t>(front_ + size_ + kGuard), guard);
    std::copy(values.begin(), values.end(), all.begin() + front_);
    check(cudaMalloc(reinterpret_cast<void**>(&data_), all.size() * sizeof(T)), "cudaMalloc");
    check(cudaMemcpy(data_, all.data(), all.size() * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
  ~Device() { cudaFree(data_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  [[nodiscard]] T* data() const { return data_ + front_; }

  // The values, once all launched work is done; checks the guards.
  [[nodiscard]] std::vector<T> values() const {
    std::vector<T> all(static_cast<std::size_t>(front_ + size_ + kGuard));
    check(cudaMemcpy(all.data(), data_, all.size() * sizeof(T), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    const auto unchanged = [&](std::int64_t first, std::int64_t count) {
      return std::all_of(all.begin() + first, all.begin() + first + count, [&](const T& value) {
        return std::memcmp(&value, &guard_, sizeof(T)) == 0;
      });
    };
    EXPECT_TRUE(unchanged(0, front_)) << "written before the array";
    EXPECT_TRUE(unchanged(front_ + size_, kGuard)) << "written after the array";
    return {all.begin() + front_, all.begin() + front_ + size_};
  }

 private:
  T* data_ = nullptr;
  std::int64_t size_;
  std::int64_t front_;
  T guard_;
};

constexpr std::int32_t kPoison = 0x5A5A5A5A;
constexpr float kPoisonScore = -12345.0F;

// Outputs of `rows` rows, poisoned.
struct Outputs {
  Outputs(std::int64_t rows, std::int64_t top_k)
      : indices(std::vector<std::int32_t>(rows * top_k, kPoison), kPoison),
        scores(std::vector<float>(rows * top_k, kPoisonScore), kPoisonScore) {}

  Device<std::int32_t> indices;
  Device<float> scores;
};

struct Selected {
  std::vector<std::int32_t> indices;
  std::vector<std::uint32_t> scores;  // their bits
};

Selected expected(std::span<const float> row, std::int64_t top_k) {
  std::vector<std::uint64_t> entries;
  for (std::size_t i = 0; i < row.size(); ++i) {
    entries.push_back(make_entry(row[i], static_cast<std::uint32_t>(i)));
  }
  if (std::ssize(entries) > top_k) {
    std::nth_element(entries.begin(), entries.begin() + top_k, entries.end(), std::greater<>());
    entries.resize(top_k);
  }
  std::sort(entries.begin(), entries.end(),
            [](std::uint64_t a, std::uint64_t b) { return entry_position(a) < entry_position(b); });
  Selected selected;
  for (const std::uint64_t entry : entries) {
    selected.indices.push_back(static_cast<std::int32_t>(entry_position(entry)));
    selected.scores.push_back(std::bit_cast<std::uint32_t>(entry_score(entry)));
  }
  selected.indices.resize(top_k, -1);
  selected.scores.resize(top_k, std::bit_cast<std::uint32_t>(-kInfinity));
  return selected;
}

Selected row_of(const std::vector<std::int32_t>& indices, const std::vector<float>& scores,
                std::int64_t row, std::int64_t top_k) {
  Selected selected;
  for (std::int64_t i = row * top_k; i < (row + 1) * top_k; ++i) {
    selected.indices.push_back(indices[i]);
    selected.scores.push_back(std::bit_cast<std::uint32_t>(scores[i]));
  }
  return selected;
}

// Reports the first difference in one line instead of two rows of thousands.
void expect_equal(const Selected& got, const Selected& want, const std::string& what) {
  const auto compare = [&](const auto& a, const auto& b, const char* name) {
    const auto [at, other] = std::mismatch(a.begin(), a.end(), b.begin());
    if (at != a.end()) {
      ADD_FAILURE() << what << ": " << name << '[' << at - a.begin() << "]: expected " << *other
                    << ", got " << *at;
    }
  };
  compare(got.indices, want.indices, "indices");
  compare(got.scores, want.scores, "scores");
}

using RowsOfScores = std::vector<std::vector<float>>;

std::vector<std::uint32_t> bits_of(const std::vector<float>& scores) {
  std::vector<std::uint32_t> bits;
  for (const float score : scores) {
    bits.push_back(std::bit_cast<std::uint32_t>(score));
  }
  return bits;
}

// Runs the selector, with and without scores, over rows that are `padding` elements apart and start
// `shift` elements after a boundary.
void check_top_k(const RowsOfScores& rows, const std::vector<std::int32_t>& lengths, int top_k,
                 const std::string& what, std::int64_t padding = 0, std::int64_t shift = 0) {
  const std::int64_t count = std::ssize(rows);
  const std::int64_t columns = std::ssize(rows[0]);
  const std::int64_t stride = columns + padding;
  std::vector<float> scores(count * stride - padding, kInfinity);
  for (std::int64_t row = 0; row < count; ++row) {
    std::copy(rows[row].begin(), rows[row].end(), scores.begin() + row * stride);
  }
  const Device<float> input(scores, kInfinity, shift);
  const Device<std::int32_t> device_lengths(lengths, std::numeric_limits<std::int32_t>::max());
  const cuda::Logits logits{input.data(), count, columns, stride,
                            lengths.empty() ? nullptr : device_lengths.data()};
  const Outputs out(count, top_k);
  const Outputs only_indices(count, top_k);
  cuda::top_k(logits, top_k, {out.indices.data(), out.scores.data()}, nullptr);
  cuda::top_k(logits, top_k, {only_indices.indices.data(), nullptr}, nullptr);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const std::vector<std::int32_t> got = out.indices.values();
  const std::vector<float> got_scores = out.scores.values();
  for (std::int64_t row = 0; row < count; ++row) {
    const std::int64_t length =
        lengths.empty() ? columns : std::clamp<std::int64_t>(lengths[row], 0, columns);
    expect_equal(row_of(got, got_scores, row, top_k),
                 expected(std::span(rows[row]).first(length), top_k),
                 what + ", k " + std::to_string(top_k) + ", columns " + std::to_string(columns) +
                     ", padding " + std::to_string(padding) + ", shift " + std::to_string(shift) +
                     ", row " + std::to_string(row));
  }
  EXPECT_EQ(only_indices.indices.values(), got) << what << ": another run, without scores";
  // By thread blocks that share a row, 1 to 16 of them, as if the device had so many SMs.
  for (std::int64_t size = 1; size <= 16 && columns > cuda::select::kShortColumns; size *= 2) {
    const Outputs shared(count, top_k);
    const int sms = static_cast<int>(size > 2 ? 2 * size * count : size * count);
    cuda::select::launch_generic(logits, top_k, {shared.indices.data(), shared.scores.data()}, true,
                                 sms, nullptr);
    EXPECT_EQ(shared.indices.values(), got) << what << ": indices of clusters of " << size;
    EXPECT_EQ(bits_of(shared.scores.values()), bits_of(got_scores))
        << what << ": scores of clusters of " << size;
  }
}

std::vector<float> normal_row(std::int64_t n, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> row(n);
  std::generate(row.begin(), row.end(), [&] { return normal(random); });
  return row;
}

class CudaSelect : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

using SmokeCudaTopK = CudaSelect;
using CudaTopK = CudaSelect;
using SmokeCudaSurvivors = CudaSelect;
using CudaSurvivors = CudaSelect;
using SmokeCudaThreshold = CudaSelect;
using CudaThreshold = CudaSelect;

TEST_F(SmokeCudaTopK, SelectsFromShortAndLongRows) {
  for (const std::int64_t columns : {1, 3, 64, 511, 8191, 20001}) {
    for (const int top_k : {1, 64, 2048}) {
      check_top_k({normal_row(columns, 1), normal_row(columns, 2)}, {}, top_k, "normal", 3, 1);
    }
  }
}

TEST_F(SmokeCudaTopK, SelectsFromTiedScoresAndMisleadingSamples) {
  for (const std::int64_t n : {9000, 20001}) {
    std::vector<float> zeros(n, 0.0F);
    std::vector<float> last(n, 0.0F);
    std::fill(last.end() - 500, last.end(), 1.0F);
    // Two values pass the threshold, and the k-th entry is among the lower ones.
    std::vector<float> two = normal_row(n, 3);
    std::transform(two.begin(), two.end(), two.begin(), [](float score) {
      return score > 1.5F ? 2.0F : score > 0.8F ? 1.0F : -1.0F;
    });
    check_top_k({zeros, last, two, std::vector<float>(n, kNaN)}, {}, 2048, "tied scores");
  }
}

TEST_F(CudaTopK, ShapesAroundEveryBoundary) {
  for (const std::int64_t boundary : {512, 2048, 4096, 8192, 16384, 32768, 65536, 70000}) {
    for (const std::int64_t beside : {-4, -1, 0, 1, 2, 5}) {
      const std::int64_t columns = boundary + beside;
      const auto seed = static_cast<std::uint64_t>(columns);
      for (const int top_k : {1, 17, 512, 2048, 2049, 16384}) {
        check_top_k({normal_row(columns, seed), normal_row(columns, seed + 1)}, {}, top_k, "normal",
                    columns % 5, columns % 4);
      }
    }
  }
}

TEST_F(CudaTopK, GeneratedShapes) {
  std::mt19937_64 random(7);
  const auto below = [&](std::int64_t end) {
    return std::uniform_int_distribution<std::int64_t>(0, end - 1)(random);
  };
  for (int i = 0; i < 150; ++i) {
    const std::int64_t columns = 1 + below(std::int64_t{1} << (1 + below(17)));
    const int top_k = static_cast<int>(1 + below(std::int64_t{1} << (1 + below(14))));
    RowsOfScores rows;
    std::vector<std::int32_t> lengths;
    for (int row = 0; row < 4; ++row) {
      rows.push_back(normal_row(columns, random()));
      if (row % 2 == 1) {  // many equal scores
        for (float& score : rows.back()) {
          score = std::round(score * 8);
        }
      }
      lengths.push_back(static_cast<std::int32_t>(below(2 * columns)));
    }
    check_top_k(rows, lengths, top_k, "generated " + std::to_string(i), below(9), below(4));
  }
}

TEST_F(CudaTopK, Lengths) {
  for (const std::int64_t columns : {4000, 9000, 20000}) {
    for (const int top_k : {1, 100, 2048}) {
      const std::vector<std::int32_t> lengths{std::numeric_limits<std::int32_t>::min(),
                                              -1,
                                              0,
                                              1,
                                              top_k - 1,
                                              top_k,
                                              top_k + 1,
                                              3001,
                                              7679,
                                              7680,
                                              7681,
                                              static_cast<std::int32_t>(columns) - 1,
                                              static_cast<std::int32_t>(columns),
                                              static_cast<std::int32_t>(columns) + 1,
                                              std::numeric_limits<std::int32_t>::max()};
      RowsOfScores rows;
      for (std::size_t i = 0; i < lengths.size(); ++i) {
        rows.push_back(normal_row(columns, i));
      }
      for (const std::int64_t shift : {0, 3}) {
        check_top_k(rows, lengths, top_k, "lengths", 2 * shift, shift);
      }
    }
  }
}

TEST_F(CudaTopK, LongRows) {
  check_top_k({normal_row(200003, 1)}, {}, 2048, "long");
  check_top_k({normal_row(1 << 20, 2)}, {}, 2048, "long");
  check_top_k({normal_row((1 << 20) + 3, 3)}, {}, 16384, "long");
}

TEST_F(CudaTopK, AdversarialRows) {
  for (const ScoreRow& row : adversarial_rows()) {
    for (const std::int64_t n : {300, 4096, 7681, 16384, 20000, 66001}) {
      for (const int top_k : {16, 2048, 8192}) {
        check_top_k({row.make(n, top_k)}, {}, top_k, std::string(row.name), 0, n % 4);
      }
    }
  }
}

// The sample takes pairs of vectors at even distances; these rows are higher, or lower, just there.
TEST_F(CudaTopK, RowsThatMisleadTheSample) {
  for (const std::int64_t n : {16384, 65536, 131072}) {
    const std::int64_t period = n / 512;
    for (const float step : {10.0F, -10.0F, kInfinity, -kInfinity, kNaN}) {
      std::vector<float> row = normal_row(n, 5);
      for (std::int64_t i = 0; i < n; ++i) {
        row[i] += i % period < 8 ? step : 0.0F;
      }
      for (const int top_k : {100, 2048, 8192}) {
        check_top_k({row}, {}, top_k, "step " + std::to_string(step));
      }
    }
  }
}

// Larger scores above tied ones: about as many as the capacity or k; and tied scores about as many
// as are still needed.
TEST_F(CudaTopK, TiedScoresAtTheThreshold) {
  for (const std::int64_t above : {0, 1, 2047, 2048, 2049, 7679, 7680, 7681}) {
    for (const std::int64_t equal : {0, 1, 2, 3000, 40000}) {
      std::vector<float> row = normal_row(66000, 11);
      for (std::int64_t i = 0; i < std::ssize(row); ++i) {
        row[i] = i < above ? 1 + std::abs(row[i]) : i < above + equal ? 1.0F : -std::abs(row[i]);
      }
      std::shuffle(row.begin(), row.end(), std::mt19937_64(3));
      check_top_k({row}, {}, 2048,
                  std::to_string(above) + " above, " + std::to_string(equal) + " equal");
    }
  }
}

// Few zeros at the sampled rank: the threshold is zero, where -0 equals +0.
TEST_F(CudaTopK, ZerosOfBothSignsAtTheThreshold) {
  std::vector<float> row = normal_row(65536, 13);
  for (std::int64_t i = 0; i < std::ssize(row); ++i) {
    const float size = std::abs(row[i]);
    row[i] = i < 3000 ? size : i < 4500 ? (i % 2 == 0 ? 0.0F : -0.0F) : -size;
  }
  std::shuffle(row.begin(), row.end(), std::mt19937_64(5));
  for (const int top_k : {2048, 3000, 3001, 4000, 4500, 4501}) {
    check_top_k({row}, {}, top_k, "zeros");
  }
}

TEST_F(CudaTopK, InfinitiesAndNaN) {
  for (const float value : {kInfinity, -kInfinity, kNaN}) {
    for (const std::int64_t others : {0, 1, 2047, 2048, 7680, 30000}) {
      std::vector<float> row(40000, value);
      const std::vector<float> normal = normal_row(others, 17);
      std::copy(normal.begin(), normal.end(), row.begin());
      std::shuffle(row.begin(), row.end(), std::mt19937_64(7));
      check_top_k({row}, {}, 2048, std::to_string(value) + " but for " + std::to_string(others));
    }
  }
}

// Rows that a thread block's registers hold: tied scores and NaN, about as many as are selected.
TEST_F(CudaTopK, TiedScoresOfShortRows) {
  for (const std::int64_t n : {1000, 4096, 8191, 16384}) {
    for (const float value : {0.0F, -0.0F, -1.0F, kInfinity, -kInfinity, kNaN}) {
      for (const std::int64_t above : {0, 1, 511, 512, 513}) {
        for (const std::int64_t equal : {0L, 1L, 2L, 300L, n}) {
          std::vector<float> row = normal_row(n, 47);
          for (std::int64_t i = 0; i < n; ++i) {
            row[i] = i < above           ? 2 + std::abs(row[i])
                     : i < above + equal ? value
                                         : -2 - std::abs(row[i]);
          }
          std::shuffle(row.begin(), row.end(), std::mt19937_64(9));
          check_top_k({row}, {}, 512,
                      std::to_string(above) + " normal, " + std::to_string(equal) + " of " +
                          std::to_string(value));
        }
      }
    }
  }
}

// All NaN are equal, whatever their sign and payload.
TEST_F(CudaTopK, NaNOfAllKinds) {
  std::vector<float> row = normal_row(5000, 53);
  for (std::size_t i = 0; i < row.size(); i += 3) {
    const auto payload = static_cast<std::uint32_t>(i * 1677 % 0x7FFFFF + 1);
    row[i] = std::bit_cast<float>((i % 2 == 0 ? 0x7F800000U : 0xFF800000U) | payload);
  }
  for (const int top_k : {1, 3000, 3333, 3334, 4000}) {
    check_top_k({row}, {}, top_k, "NaN");
  }
}

TEST_F(CudaTopK, SelectsTheSameTwice) {
  RowsOfScores rows;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    rows.push_back(normal_row(8192, seed));
    for (float& score : rows.back()) {
      score = std::round(score * 16);
    }
  }
  for (int i = 0; i < 3; ++i) {
    check_top_k(rows, {}, 2048, "repeated");
  }
}

TEST_F(CudaTopK, CanBeCaptured) {
  const std::vector<float> row = normal_row(30000, 19);
  const Device<float> input(row, kInfinity);
  const Outputs out(1, 512);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
  cuda::top_k({input.data(), 1, 30000}, 512, {out.indices.data(), out.scores.data()}, stream);
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  expect_equal(row_of(out.indices.values(), out.scores.values(), 0, 512), expected(row, 512),
               "captured");
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// Threads that select other numbers of positions launch the same kernels with other amounts of
// shared memory.
TEST_F(CudaTopK, ThreadsThatSelectOtherNumbersDoNotDisturbEachOther) {
  constexpr int kCalls = 3000;
  const std::vector<float> row = normal_row(20000, 20);
  const auto select = [&](int top_k) {
    const Device<float> input(row, kInfinity);
    const Outputs out(1, top_k);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    for (int i = 0; i < kCalls; ++i) {
      cuda::top_k({input.data(), 1, 20000}, top_k, {out.indices.data(), out.scores.data()}, stream);
    }
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    cudaStreamDestroy(stream);
    return row_of(out.indices.values(), out.scores.values(), 0, top_k);
  };
  const std::vector<int> numbers{2048, 64, 1024};
  std::vector<std::future<Selected>> threads;
  threads.reserve(numbers.size());
  for (const int top_k : numbers) {
    threads.push_back(std::async(std::launch::async, select, top_k));
  }
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    expect_equal(threads[i].get(), expected(row, numbers[i]),
                 "beside others, k " + std::to_string(numbers[i]));
  }
}

// --- The fused path ---

// Candidates as scoring with a gate writes them: all scores that exceed a threshold, each in the
// list that its position gives. The rows' keys follow one another (Sequences).
struct Survivors {
  std::int64_t lists;
  std::int64_t capacity;
  std::vector<cuda::Candidate> entries;  // [T, lists, capacity], with junk after the candidates
  std::vector<std::uint32_t> counts;     // [T, lists]
};

Survivors survivors_of(const RowsOfScores& rows, const std::vector<float>& thresholds,
                       std::int64_t lists, std::int64_t capacity) {
  const std::int64_t count = std::ssize(rows);
  Survivors survivors{
      lists, capacity,
      std::vector<cuda::Candidate>(count * lists * capacity, cuda::Candidate{kInfinity, 77}),
      std::vector<std::uint32_t>(count * lists, 0)};
  std::mt19937_64 random(23);
  std::uint32_t start = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    std::vector<std::uint32_t> positions;
    for (std::size_t i = 0; i < rows[t].size(); ++i) {
      if (rows[t][i] > thresholds[t]) {
        positions.push_back(static_cast<std::uint32_t>(i));
      }
    }
    std::shuffle(positions.begin(), positions.end(), random);
    for (const std::uint32_t position : positions) {
      const std::int64_t list = t * lists + position / 64 % lists;
      const std::uint32_t place = survivors.counts[list]++;
      if (place < capacity) {
        survivors.entries[list * capacity + place] = {rows[t][position], start + position};
      }
    }
    start += static_cast<std::uint32_t>(rows[t].size());
  }
  return survivors;
}

// Queries whose keys follow one another, as many as each row has scores.
class Sequences {
 public:
  explicit Sequences(const RowsOfScores& rows)
      : total_(total(rows)), starts_(ranges(rows, false), -7), ends_(ranges(rows, true), -7) {}

  [[nodiscard]] cuda::DeviceRaggedSource keys() const {
    cuda::DeviceRaggedSource keys{};
    keys.tokens = total_;
    keys.starts = starts_.data();
    keys.ends = ends_.data();
    keys.max_keys = std::numeric_limits<std::int32_t>::max();
    return keys;
  }

 private:
  static std::int64_t total(const RowsOfScores& rows) {
    std::int64_t sum = 0;
    for (const auto& row : rows) {
      sum += std::ssize(row);
    }
    return sum;
  }
  static std::vector<std::int32_t> ranges(const RowsOfScores& rows, bool ends) {
    std::vector<std::int32_t> edges;
    std::int64_t sum = 0;
    for (const auto& row : rows) {
      edges.push_back(static_cast<std::int32_t>(sum + (ends ? std::ssize(row) : 0)));
      sum += std::ssize(row);
    }
    return edges;
  }

  std::int64_t total_;
  Device<std::int32_t> starts_;
  Device<std::int32_t> ends_;
};

// `width` random blocks of positions below n, ascending; the last may extend beyond n.
std::vector<std::int32_t> blocks_below(std::int64_t n, std::int64_t block, std::int64_t width,
                                       std::uint64_t seed) {
  std::vector<std::int32_t> all((n + block - 1) / block);
  std::iota(all.begin(), all.end(), 0);
  std::vector<std::int32_t> list;
  std::sample(all.begin(), all.end(), std::back_inserter(list), width, std::mt19937_64(seed));
  list.resize(width, -1);
  return list;
}

// Selects from scores of gathered columns, of queries that see from 0 to many keys; the result must
// be the positions that the columns stand for.
void check_gathered(std::int64_t block, std::int64_t width, int top_k, bool with_scores) {
  const std::int64_t columns = block * width;
  const RowsOfScores seen{std::vector<float>(3 * columns), std::vector<float>(3 * columns - 1),
                          std::vector<float>(columns + 7), std::vector<float>(columns / 2),
                          std::vector<float>(1),           {}};
  const std::int64_t count = std::ssize(seen);
  const Sequences sequences(seen);
  std::vector<std::int32_t> lists;
  std::vector<std::int32_t> lengths;
  std::vector<float> scores;
  std::vector<Selected> want;
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int64_t n = std::ssize(seen[t]);
    const auto list = blocks_below(n, block, width, static_cast<std::uint64_t>(t));
    std::vector<std::int32_t> positions;
    for (const std::int64_t first : list) {
      for (std::int64_t p = first * block; first >= 0 && p < std::min((first + 1) * block, n);
           ++p) {
        positions.push_back(static_cast<std::int32_t>(p));
      }
    }
    std::vector<float> row = normal_row(columns, static_cast<std::uint64_t>(t));
    want.push_back(expected(std::span(row).first(positions.size()), top_k));
    for (std::int32_t& index : want.back().indices) {
      index = index < 0 ? -1 : positions[index];
    }
    lists.insert(lists.end(), list.begin(), list.end());
    lengths.push_back(static_cast<std::int32_t>(positions.size()));
    scores.insert(scores.end(), row.begin(), row.end());
  }
  const Device<std::int32_t> device_lists(lists, 12345);
  const Device<std::int32_t> device_lengths(lengths, std::numeric_limits<std::int32_t>::max());
  const Device<float> input(scores, kInfinity);
  const Outputs out(count, top_k);
  cuda::select::launch_short(
      {input.data(), count, columns, columns, device_lengths.data()}, sequences.keys(),
      {device_lists.data(), static_cast<std::int32_t>(width), static_cast<std::int32_t>(block)},
      top_k, {out.indices.data(), with_scores ? out.scores.data() : nullptr}, true, nullptr);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const std::vector<std::int32_t> indices = out.indices.values();
  const std::vector<float> got_scores = out.scores.values();
  for (std::int64_t t = 0; t < count; ++t) {
    const Selected got = row_of(indices, got_scores, t, top_k);
    if (!with_scores) {
      want[t].scores = got.scores;
    }
    expect_equal(got, want[t],
                 "blocks of " + std::to_string(block) + ", k " + std::to_string(top_k) + ", row " +
                     std::to_string(t));
  }
}

TEST_F(SmokeCudaTopK, WritesThePositionsOfGatheredColumns) {
  check_gathered(128, 64, 2048, true);
  check_gathered(1, 4096, 2048, false);
}

TEST_F(CudaTopK, WritesThePositionsOfGatheredColumns) {
  for (const std::int64_t block : {1, 2, 64, 100, 128, 1024}) {
    for (const std::int64_t columns : {1024, 4096, 5000, 8192, 16384}) {
      for (const int top_k : {1, 100, 2048, 5000}) {
        check_gathered(block, std::max<std::int64_t>(1, columns / block), top_k, top_k % 2 == 0);
      }
    }
  }
}

// Runs launch_survivors with or without scores; returns the fallback rows, sorted.
std::vector<std::int32_t> check_survivors(const RowsOfScores& rows, const Survivors& survivors,
                                          int top_k, const std::string& what,
                                          bool with_scores = true) {
  const std::int64_t count = std::ssize(rows);
  const Sequences sequences(rows);
  const Device<cuda::Candidate> entries(survivors.entries, {kInfinity, 99});
  const Device<std::uint32_t> counts(survivors.counts, 0xFFFFFFFFU);
  const cuda::Candidates candidates{entries.data(), counts.data(),
                                    static_cast<std::uint32_t>(survivors.lists),
                                    static_cast<std::uint32_t>(survivors.capacity)};
  const Device<std::int32_t> fallback_rows(std::vector<std::int32_t>(count, kPoison), kPoison);
  const Device<std::uint32_t> fallback_count(std::vector<std::uint32_t>{0}, 0x5A5A5A5AU);
  const Outputs out(count, top_k);
  cuda::select::launch_survivors(candidates, sequences.keys(), count, top_k,
                                 {out.indices.data(), with_scores ? out.scores.data() : nullptr},
                                 true, {fallback_rows.data(), fallback_count.data(), nullptr},
                                 nullptr);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  std::vector<std::int32_t> fallback = fallback_rows.values();
  fallback.resize(fallback_count.values()[0]);
  std::sort(fallback.begin(), fallback.end());
  const std::vector<std::int32_t> indices = out.indices.values();
  const std::vector<float> scores = out.scores.values();
  for (std::int64_t t = 0; t < count; ++t) {
    if (std::binary_search(fallback.begin(), fallback.end(), t)) {
      continue;
    }
    Selected want = expected(rows[t], top_k);
    const Selected got = row_of(indices, scores, t, top_k);
    if (!with_scores) {
      want.scores = got.scores;
    }
    expect_equal(got, want, what + ", k " + std::to_string(top_k) + ", row " + std::to_string(t));
  }
  return fallback;
}

// A threshold that lets `count` scores of a row through, or all if it has no more.
float threshold_for(const std::vector<float>& row, std::int64_t count) {
  std::vector<float> sorted = row;
  if (count >= std::ssize(sorted)) {
    return -kInfinity;
  }
  std::nth_element(sorted.begin(), sorted.begin() + count, sorted.end(), std::greater<>());
  return sorted[count];
}

TEST_F(SmokeCudaSurvivors, SelectsExactly) {
  RowsOfScores rows;
  std::vector<float> thresholds;
  for (const std::int64_t n : {5000, 3000, 2048, 100, 0}) {
    rows.push_back(normal_row(n, static_cast<std::uint64_t>(n)));
    thresholds.push_back(threshold_for(rows.back(), 3000));
  }
  const Survivors survivors = survivors_of(rows, thresholds, 24, 256);
  EXPECT_TRUE(check_survivors(rows, survivors, 2048, "with scores").empty());
  EXPECT_TRUE(check_survivors(rows, survivors, 2048, "without scores", false).empty());
}

// Candidates that registers hold, and more, of rows longer than one bitmap.
TEST_F(SmokeCudaSurvivors, LongRow) {
  const RowsOfScores rows{normal_row(300000, 5), normal_row(300000, 6)};
  const Survivors survivors =
      survivors_of(rows, {threshold_for(rows[0], 3000), threshold_for(rows[1], 14000)}, 16, 2000);
  EXPECT_TRUE(check_survivors(rows, survivors, 2048, "long").empty());
}

// `count` tied scores after `above` larger ones: the k-th entry above, among and below them; in
// rows that registers hold and that they don't, with positions of 16, 17 and more bits.
TEST_F(SmokeCudaSurvivors, TiedScores) {
  struct Ties {
    std::int64_t above;
    std::int64_t count;
  };
  for (const std::int64_t length : {20000, 100000, 300000}) {
    for (const Ties& ties : {Ties{0, 6000}, Ties{1000, 1500}, Ties{5000, 1500}}) {
      const std::int64_t end = ties.above + ties.count;
      RowsOfScores rows{normal_row(length, 7)};
      std::vector<float> sorted = rows[0];
      std::sort(sorted.begin(), sorted.end(), std::greater<>());
      for (float& score : rows[0]) {
        score = score >= sorted[end - 1] && score < sorted[ties.above] ? sorted[ties.above] : score;
      }
      for (const std::int64_t count : {end, end + 500, std::int64_t{13000}}) {
        const Survivors survivors = survivors_of(rows, {threshold_for(rows[0], count)}, 16, 1000);
        for (const std::int64_t top_k :
             {ties.above, ties.above + 1, ties.above + 1048, end - 1, end, end + 1}) {
          if (top_k == 0 || top_k > count) {
            continue;
          }
          const int k = static_cast<int>(top_k);
          EXPECT_TRUE(check_survivors(rows, survivors, k, "with scores").empty());
          EXPECT_TRUE(check_survivors(rows, survivors, k, "without scores", false).empty());
        }
      }
    }
  }
}

TEST_F(SmokeCudaSurvivors, ReportsFallbackRows) {
  const RowsOfScores rows{normal_row(5000, 1), normal_row(5000, 2), normal_row(5000, 3),
                          normal_row(50, 4)};
  const std::vector<float> thresholds{threshold_for(rows[0], 99), threshold_for(rows[1], 100),
                                      threshold_for(rows[2], 2000), 0.0F};
  const Survivors survivors = survivors_of(rows, thresholds, 16, 64);
  // Too few; just enough; lists that overflow; a short row with candidates missing.
  EXPECT_EQ(check_survivors(rows, survivors, 100, "with scores"),
            (std::vector<std::int32_t>{0, 2, 3}));
  EXPECT_EQ(check_survivors(rows, survivors, 100, "without scores", false),
            (std::vector<std::int32_t>{0, 2}));
}

TEST_F(CudaSurvivors, GeneratedShapes) {
  std::mt19937_64 random(29);
  const auto below = [&](std::int64_t end) {
    return std::uniform_int_distribution<std::int64_t>(0, end - 1)(random);
  };
  for (int i = 0; i < 100; ++i) {
    const int top_k = static_cast<int>(1 + below(std::int64_t{1} << (1 + below(14))));
    RowsOfScores rows;
    std::vector<float> thresholds;
    for (int t = 0; t < 4; ++t) {
      rows.push_back(normal_row(below(std::int64_t{1} << (1 + below(17))), random()));
      if (t % 2 == 1) {
        for (float& score : rows.back()) {
          score = std::round(score * 64);
        }
      }
      thresholds.push_back(threshold_for(rows.back(), top_k + below(top_k) + 4));
    }
    const std::int64_t lists = 1 + below(cuda::select::kMaxLists);
    const std::int64_t capacity = 2 * top_k / lists + 200;
    const Survivors survivors = survivors_of(rows, thresholds, lists, capacity);
    check_survivors(rows, survivors, top_k, "generated " + std::to_string(i), i % 3 != 0);
  }
}

// Few long lists that end at different places in the chunks of a warp, of rows that registers hold
// and that they don't.
TEST_F(CudaSurvivors, FewLongLists) {
  for (const std::int64_t length : {60000, 70000}) {
    for (const std::int64_t lists : {1, 2, 3, 4, 16, 32}) {
      for (const std::int64_t count : {100, 2048, 2049, 3300, 3969, 4032, 4095, 4096, 4097, 5000}) {
        const RowsOfScores rows{normal_row(length, static_cast<std::uint64_t>(count))};
        const Survivors survivors =
            survivors_of(rows, {threshold_for(rows[0], count)}, lists, 2 * count / lists + 200);
        for (const int top_k : {100, 2048}) {
          EXPECT_EQ(check_survivors(rows, survivors, top_k,
                                    std::to_string(count) + " in " + std::to_string(lists))
                        .empty(),
                    count >= top_k);
        }
      }
    }
  }
}

// Completely filled lists; the last one ends where the array does.
TEST_F(CudaSurvivors, FullLists) {
  for (const std::int64_t lists : {1, 4, 16}) {
    const RowsOfScores rows{normal_row(1024 * lists, 3), normal_row(1024 * lists, 4)};
    const Survivors survivors = survivors_of(rows, {-kInfinity, -kInfinity}, lists, 1024);
    for (const int top_k : {1, 512, 1023, 4096}) {
      EXPECT_TRUE(check_survivors(rows, survivors, top_k, "full").empty());
    }
  }
}

// As many candidates as fit registers, or registers and shared memory; one more; and far more; with
// positions of 16 and 17 bits.
TEST_F(CudaSurvivors, MoreThanRegistersHold) {
  for (const std::int64_t length : {65536, 65537, 131072}) {
    for (const std::int64_t count :
         {4608, 4609, 5632, 5633, 8192, 8193, 9216, 9217, 13312, 13313, 60000}) {
      const RowsOfScores rows{normal_row(length, static_cast<std::uint64_t>(count))};
      const std::vector<float> thresholds{threshold_for(rows[0], count)};
      for (const std::int64_t lists : {1, 32}) {
        const Survivors survivors = survivors_of(rows, thresholds, lists, 2 * count / lists);
        for (const int top_k : {2048, 4096, 8192}) {
          EXPECT_EQ(check_survivors(rows, survivors, top_k, std::to_string(count)).empty(),
                    count >= top_k);
        }
      }
    }
  }
  const RowsOfScores rows{normal_row(70000, 1)};
  const Survivors survivors = survivors_of(rows, {-kInfinity}, 1, 70000);
  EXPECT_TRUE(check_survivors(rows, survivors, 16384, "one list").empty());
}

TEST_F(CudaSurvivors, TiesAndWideRanges) {
  std::vector<float> equal(40000, 1.0F);
  std::vector<float> zeros = normal_row(40000, 31);
  std::vector<float> wide = normal_row(40000, 37);
  for (std::size_t i = 0; i < zeros.size(); ++i) {
    zeros[i] = std::max(0.0F, zeros[i] - 2);
    wide[i] = std::ldexp(wide[i], static_cast<int>(i * 37 % 200) - 100);
  }
  wide[5] = kInfinity;
  const RowsOfScores rows{equal, zeros, wide};
  for (const int top_k : {1, 2048, 8192}) {
    const Survivors survivors = survivors_of(rows, {0.5F, -0.5F, -kInfinity}, 25, 4000);
    EXPECT_TRUE(check_survivors(rows, survivors, top_k, "ties").empty());
  }
}

// Rows of one bitmap and of several, that registers hold and that they don't, also with tied
// scores.
TEST_F(CudaSurvivors, LongRows) {
  for (const std::int64_t length : {131073, 262144, 262145, 600000}) {
    RowsOfScores rows{normal_row(length, 41), normal_row(length, 43)};
    for (float& score : rows[1]) {
      score = std::round(score * 16);
    }
    for (const std::int64_t count : {3000, 8192, 8193, 12288, 12289, 30000}) {
      const Survivors survivors = survivors_of(
          rows, {threshold_for(rows[0], count), threshold_for(rows[1], count)}, 32, count / 8);
      for (const int top_k : {2048, 2999, 8192}) {
        const std::vector<std::int32_t> fallback = check_survivors(
            rows, survivors, top_k, std::to_string(count) + " of " + std::to_string(length));
        EXPECT_EQ(std::count(fallback.begin(), fallback.end(), 0), count < top_k ? 1 : 0);
      }
    }
  }
  const RowsOfScores rows{normal_row(3000000, 41)};
  const Survivors survivors = survivors_of(rows, {threshold_for(rows[0], 3000)}, 16, 512);
  EXPECT_TRUE(check_survivors(rows, survivors, 2048, "long").empty());
}

// Every stride-th score, counted from the first key of all rows, as scoring takes samples; NaN in
// the columns that a row does not see.
std::vector<float> sample(const RowsOfScores& rows, std::int64_t stride, std::int64_t columns) {
  std::vector<float> samples(rows.size() * columns, kNaN);
  std::int64_t start = 0;
  for (std::size_t t = 0; t < rows.size(); ++t) {
    for (std::int64_t i = 0; i < std::ssize(rows[t]); ++i) {
      if ((start + i) % stride == 0) {
        samples[t * columns + (start + i) / stride] = rows[t][i];
      }
    }
    start += std::ssize(rows[t]);
  }
  return samples;
}

std::vector<float> thresholds_of(const RowsOfScores& rows, const std::vector<float>& samples,
                                 std::int64_t columns, int top_k) {
  const std::int64_t count = std::ssize(rows);
  const Sequences sequences(rows);
  const Device<float> device_samples(samples, kInfinity);
  const Device<float> thresholds(std::vector<float>(count, kPoisonScore), kPoisonScore);
  const Device<std::uint32_t> fallback_count(std::vector<std::uint32_t>{5}, 0x5A5A5A5AU);
  const Device<std::uint32_t> finished_splits(std::vector<std::uint32_t>(count, 5), 0x5A5A5A5AU);
  cuda::select::launch_threshold({device_samples.data(), columns, columns}, sequences.keys(), count,
                                 top_k, thresholds.data(),
                                 {nullptr, fallback_count.data(), finished_splits.data()}, nullptr);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  EXPECT_EQ(fallback_count.values()[0], 0U);
  EXPECT_EQ(finished_splits.values(), std::vector<std::uint32_t>(count, 0));
  return thresholds.values();
}

TEST_F(SmokeCudaThreshold, LetsEverythingThroughWhereItCannotSay) {
  const RowsOfScores rows{normal_row(100, 1), normal_row(101, 2), normal_row(0, 3),
                          normal_row(150, 4)};
  // One sample in 64: too few for k = 100 of up to 150.
  EXPECT_EQ(thresholds_of(rows, sample(rows, 64, 33), 33, 100), std::vector<float>(4, -kInfinity));
}

// If all scores are sampled, k exceed the threshold, and at most a sixteenth more.
TEST_F(SmokeCudaThreshold, IsExactWithoutSampling) {
  const RowsOfScores rows{normal_row(1000, 1), normal_row(800, 2)};
  const std::vector<float> thresholds = thresholds_of(rows, sample(rows, 1, 1800), 1800, 100);
  for (std::size_t t = 0; t < rows.size(); ++t) {
    const auto above = std::count_if(rows[t].begin(), rows[t].end(),
                                     [&](float score) { return score > thresholds[t]; });
    EXPECT_GE(above, 100);
    EXPECT_LE(above, 101 + 101 / 16);
  }
}

TEST_F(CudaThreshold, LetsFewMoreThanTheTopKThrough) {
  struct Shape {
    std::int64_t n;
    std::int64_t stride;
    int top_k;
  };
  for (const Shape& shape : {Shape{8192, 16, 512}, Shape{65536, 64, 2048}, Shape{65536, 32, 2048},
                             Shape{131072, 64, 4096}, Shape{131072, 32, 8192}}) {
    RowsOfScores rows;
    for (std::uint64_t t = 0; t < 8; ++t) {
      rows.push_back(normal_row(shape.n + static_cast<std::int64_t>(t), t));
    }
    // One row at a time, so that its samples start in column 0.
    for (const auto& row : rows) {
      const std::int64_t columns = (std::ssize(row) + shape.stride - 1) / shape.stride;
      const std::int64_t padded =
          std::min<std::int64_t>(columns + 5, cuda::select::kMaxGateSamples);
      if (columns > padded) {
        continue;
      }
      const float threshold =
          thresholds_of({row}, sample({row}, shape.stride, padded), padded, shape.top_k)[0];
      const auto above = static_cast<double>(
          std::count_if(row.begin(), row.end(), [&](float score) { return score > threshold; }));
      // The threshold's rank in the sample, a sixteenth more, and five standard deviations.
      const double mean = static_cast<double>(shape.top_k) / static_cast<double>(shape.stride);
      const double rank = (mean + 4.5 * std::sqrt(mean) + 2) * 17 / 16;
      const double most = static_cast<double>(shape.stride) * (rank + 5 * std::sqrt(rank));
      EXPECT_GT(above, shape.top_k) << shape.n;
      EXPECT_LT(above, most) << shape.n;
    }
  }
}

// The rank falls among many tied zeros: only the scores above zero pass.
TEST_F(CudaThreshold, LeavesManyTiedScoresOut) {
  std::vector<float> row = normal_row(65536, 43);
  for (float& score : row) {
    score = std::max(0.0F, score - 1.75F);  // about 2600 above zero
  }
  EXPECT_EQ(thresholds_of({row}, sample({row}, 32, 2048), 2048, 2048), std::vector<float>{0.0F});
}

// Thresholds around 1, a sixteenth of the largest score, below which the search continues in wider
// buckets. These start at the smallest score, which is chosen so that one of them would extend
// beyond 1.
TEST_F(CudaThreshold, CountsNoSampleTwice) {
  constexpr std::int64_t kStride = 8;
  std::vector<float> row(16384);
  std::mt19937_64 random(47);
  std::generate(row.begin(), row.end(),
                [&] { return std::uniform_real_distribution<float>(-1.25F, 2.0F)(random); });
  row[0] = 16;
  row[kStride] = -1.25F;
  const std::vector<float> samples = sample({row}, kStride, 2048);
  for (int top_k = 4000; top_k <= 6000; top_k += 100) {  // about 5040 exceed 1
    const float threshold = thresholds_of({row}, samples, 2048, top_k)[0];
    EXPECT_GT(std::count_if(row.begin(), row.end(), [&](float score) { return score > threshold; }),
              top_k);
  }
}

TEST_F(CudaThreshold, TakesNaNForNoSample) {
  std::vector<float> row(65536, kNaN);
  EXPECT_EQ(thresholds_of({row}, sample({row}, 32, 2048), 2048, 2048),
            std::vector<float>{-kInfinity});
}

}  // namespace
}  // namespace misa::test
