// SPDX-License-Identifier: Apache-2.0
// Routing and the block filter from block means in device memory: what the CPU makes of the
// same means in host memory, from inputs and a workspace between red zones.
#include <gmock/gmock.h>

#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common.hpp"
#include "misa/cuda.hpp"
#include "misa/error.hpp"

namespace misa::test {
namespace {

using ::testing::Each;
using ::testing::StartsWith;

// Small integers, for which fp32 is exact and ties are common. Rows of means are shared by queries
// of any start.
struct IntegerMeans {
  RaggedInputs inputs;
  std::int64_t count;
  std::vector<float> rows;
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> ends;
  std::vector<std::int32_t> partial;

  IntegerMeans(DType q_dtype, std::int64_t dim, std::int64_t heads, std::int64_t tokens,
               std::int32_t rows_of_means, std::int32_t longest)
      : inputs(make_pack({.sequences = {{tokens, tokens}},
                          .heads = heads,
                          .dim = dim,
                          .q_dtype = q_dtype,
                          .values = Values::integers})),
        count(rows_of_means) {
    std::mt19937 engine(11);
    const auto random = [&](std::int32_t below) {
      return static_cast<std::int32_t>(engine() % static_cast<std::uint32_t>(below));
    };
    for (std::int64_t i = 0; i < count * dim; ++i) {
      rows.push_back(static_cast<float>(random(9) - 4));
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      const bool again = t % 3 == 1;  // queries of one start stand together too
      const std::int32_t start = again ? starts.back() : random(rows_of_means);
      const std::int32_t length = t % 7 == 0 ? 0 : random(longest + 1);
      starts.push_back(start);
      ends.push_back(std::min(start + length, rows_of_means));
      partial.push_back(t % 4 == 0 ? -1 : random(rows_of_means));
    }
  }

  [[nodiscard]] Queries q() const { return inputs.q(inputs.all()); }
  [[nodiscard]] Weights w() const { return inputs.w(inputs.all()); }
  [[nodiscard]] RaggedMeans view() const {
    return {rows.data(), count, q().dim, 0, starts, ends, partial};
  }

  using HostCall = void (*)(const Context&, const Queries&, const Weights&, const RaggedMeans&, int,
                            std::span<std::int32_t>);
  [[nodiscard]] std::vector<std::int32_t> on_host(HostCall call, int width,
                                                  const RaggedMeans& means) const {
    std::vector<std::int32_t> out(static_cast<std::size_t>(q().tokens * width), -77);
    call(context_for("cpu"), q(), w(), means, width, out);
    return out;
  }
};

using DeviceCall = void (*)(const Queries&, const Weights&, const RaggedMeans&, int,
                            std::span<std::int32_t>, std::span<std::byte>, void*, std::string_view);

// The same on the device.
class OnDevice {
 public:
  explicit OnDevice(const IntegerMeans& in)
      : in_(in),
        q_({static_cast<const std::byte*>(in.q().data),
            static_cast<std::size_t>(in.q().tokens * in.q().heads * in.q().dim) *
                size_of(in.q().dtype)}),
        w_({in.w().data, static_cast<std::size_t>(in.w().tokens * in.w().heads)}),
        rows_(std::span<const float>(in.rows)),
        starts_(std::span<const std::int32_t>(in.starts)),
        ends_(std::span<const std::int32_t>(in.ends)),
        partial_(std::span<const std::int32_t>(in.partial)),
        workspace_(cuda::means_workspace_bytes(in.q().tokens, in.q().dim, in.count)) {}

  [[nodiscard]] std::vector<std::int32_t> run(DeviceCall call, int width,
                                              const std::string& backend) const {
    const Guarded<std::int32_t> out(static_cast<std::size_t>(in_.q().tokens * width));
    enqueue(call, width, out.span(), workspace_.span(), nullptr, backend);
    expect_success(cudaDeviceSynchronize());
    static_cast<void>(workspace_.read());  // checks its zones
    return out.read();
  }

  void enqueue(DeviceCall call, int width, std::span<std::int32_t> out,
               std::span<std::byte> workspace, cudaStream_t stream,
               const std::string& backend) const {
    Queries q = in_.q();
    q.data = q_.data();
    Weights w = in_.w();
    w.data = w_.data();
    call(q, w, {rows_.data(), in_.count, q.dim, 0, starts_.span(), ends_.span(), partial_.span()},
         width, out, workspace, stream, backend);
  }

  [[nodiscard]] std::span<std::byte> workspace() const { return workspace_.span(); }

 private:
  const IntegerMeans& in_;
  Guarded<std::byte> q_;
  Guarded<float> w_;
  Guarded<float> rows_;
  Guarded<std::int32_t> starts_;
  Guarded<std::int32_t> ends_;
  Guarded<std::int32_t> partial_;
  Guarded<std::byte> workspace_;
};

class DeviceMeans : public EachCudaBackend {};

TEST_P(DeviceMeans, SmokeMatchTheHost) {
  for (const DType q_dtype : {DType::f32, DType::bf16, DType::e4m3}) {
    for (const std::int64_t dim : {64, 128}) {
      for (const std::int64_t heads : {1, 32, 64, 100, 256}) {
        const IntegerMeans in(q_dtype, dim, heads, 61, 2000, 300);
        const OnDevice device(in);
        for (const int count : {0, 1, static_cast<int>(heads)}) {
          EXPECT_EQ(device.run(cuda::route_from_means, count, GetParam()),
                    in.on_host(route_from_means, count, in.view()))
              << count << " of " << heads << " heads, " << name_of(q_dtype) << ", D = " << dim;
        }
        for (const int count : {2, 5, 400}) {
          EXPECT_EQ(device.run(cuda::keep_blocks_from_means, count, GetParam()),
                    in.on_host(keep_blocks_from_means, count, in.view()))
              << count << " blocks, " << heads << " heads, " << name_of(q_dtype) << ", D = " << dim;
        }
      }
    }
  }
}

// More block scores than are computed at a time, and rows of more blocks than a warp keeps.
TEST_P(DeviceMeans, ManyMeans) {
  const IntegerMeans in(DType::bf16, 64, 8, 900, 40000, 3000);
  const OnDevice device(in);
  EXPECT_EQ(device.run(cuda::keep_blocks_from_means, 64, GetParam()),
            in.on_host(keep_blocks_from_means, 64, in.view()));
  EXPECT_EQ(device.run(cuda::route_from_means, 3, GetParam()),
            in.on_host(route_from_means, 3, in.view()));
}

// Rows that no host ever saw: whatever they hold is clamped, never followed.
TEST_P(DeviceMeans, SmokeRowsAreClamped) {
  constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
  IntegerMeans in(DType::e4m3, 128, 64, 10, 50, 20);
  in.starts = {0, kLeast, kMost, 50, 51, -1, 20, 40, kMost, 3};
  in.ends = {kMost, kMost, kLeast, 60, kMost, 50, -5, 39, kMost, 9};
  in.partial = {kMost, kLeast, 50, 49, -2, 0, 7, 8, -1, 51};
  IntegerMeans clamped = in;
  for (std::size_t t = 0; t < in.starts.size(); ++t) {
    clamped.starts[t] = std::clamp(in.starts[t], 0, 50);
    clamped.ends[t] = std::clamp(in.ends[t], clamped.starts[t], 50);
    clamped.partial[t] = in.partial[t] >= 0 && in.partial[t] < 50 ? in.partial[t] : -1;
  }
  const OnDevice device(in);
  EXPECT_EQ(device.run(cuda::route_from_means, 5, GetParam()),
            clamped.on_host(route_from_means, 5, clamped.view()));
  EXPECT_EQ(device.run(cuda::keep_blocks_from_means, 4, GetParam()),
            clamped.on_host(keep_blocks_from_means, 4, clamped.view()));
}

TEST_P(DeviceMeans, SmokeNothingToSee) {
  IntegerMeans in(DType::f32, 64, 8, 5, 1, 1);
  in.count = 0;
  in.partial.assign(5, 0);
  const OnDevice device(in);
  EXPECT_THAT(device.run(cuda::route_from_means, 3, GetParam()), Each(-1));
  EXPECT_THAT(device.run(cuda::keep_blocks_from_means, 3, GetParam()), Each(-1));
}

TEST_P(DeviceMeans, SmokeAGraphReplays) {
  const IntegerMeans in(DType::bf16, 128, 64, 40, 200, 100);
  const OnDevice device(in);
  const Guarded<std::int32_t> heads(40 * 8);
  const Guarded<std::int32_t> blocks(40 * 6);
  cudaStream_t stream = nullptr;
  expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  device.enqueue(cuda::route_from_means, 8, heads.span(), device.workspace(), stream, GetParam());
  device.enqueue(cuda::keep_blocks_from_means, 6, blocks.span(), device.workspace(), stream,
                 GetParam());
  cudaGraph_t graph = nullptr;
  expect_success(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  expect_success(cudaGraphInstantiate(&executable, graph, 0));
  for (int i = 0; i < 2; ++i) {
    expect_success(cudaGraphLaunch(executable, stream));
    expect_success(cudaStreamSynchronize(stream));
    EXPECT_EQ(heads.read(), in.on_host(route_from_means, 8, in.view()));
    EXPECT_EQ(blocks.read(), in.on_host(keep_blocks_from_means, 6, in.view()));
  }
  expect_success(cudaGraphExecDestroy(executable));
  expect_success(cudaGraphDestroy(graph));
  expect_success(cudaStreamDestroy(stream));
}

TEST_P(DeviceMeans, RefuseBadArguments) {
  const IntegerMeans in(DType::bf16, 64, 8, 5, 20, 10);
  const OnDevice device(in);
  const Guarded<std::int32_t> out(5 * 3);
  const auto message = [](const std::function<void()>& act) -> std::string {
    try {
      act();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  const auto run = [&](DeviceCall call, int width, std::span<std::int32_t> written,
                       std::span<std::byte> workspace, const std::string& backend) {
    return message([&] { device.enqueue(call, width, written, workspace, nullptr, backend); });
  };
  const std::span<std::byte> memory = device.workspace();
  const auto route = cuda::route_from_means;
  EXPECT_EQ(run(route, 3, out.span(), memory, GetParam()), "no error");
  EXPECT_THAT(run(route, 9, out.span(), memory, GetParam()), StartsWith("heads: "));
  EXPECT_THAT(run(route, 2, out.span(), memory, GetParam()), StartsWith("out: "));
  EXPECT_THAT(run(route, 3, out.span(), memory.first(memory.size() - 1), GetParam()),
              StartsWith("workspace: "));
  EXPECT_THAT(run(route, 3, out.span(), memory, "cpu"), StartsWith("backend: "));
  EXPECT_THAT(run(cuda::keep_blocks_from_means, 1, out.span(), memory, GetParam()),
              StartsWith("filter_blocks: "));
  EXPECT_THAT(message([] { cuda::means_workspace_bytes(-1, 64, 3); }), StartsWith("q: "));
  EXPECT_THAT(message([] { cuda::means_workspace_bytes(1, 65, 3); }), StartsWith("q: "));
  EXPECT_THAT(message([] { cuda::means_workspace_bytes(1, 64, -3); }), StartsWith("means: "));
}

INSTANTIATE_TEST_SUITE_P(Each, DeviceMeans, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
