// SPDX-License-Identifier: Apache-2.0
// Reading the inputs of a trace from files.
#include "trace.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "program.hpp"

namespace misa::cli {
namespace {

using ::testing::ElementsAre;

TEST(SmokeTrace, ReadsContiguousKeys) {
  const Folder folder;
  const Tensors tensors = ragged_input();
  write_tensors(folder / "t", tensors);
  const Trace trace(folder / "t");
  const StepInputs& inputs = trace.inputs();
  EXPECT_EQ(inputs.q.tokens, 3);
  EXPECT_EQ(inputs.q.heads, 4);
  EXPECT_EQ(inputs.q.dim, 64);
  EXPECT_EQ(inputs.w.data[11], values_of<float>(tensors.at("w"))[11]);
  const auto& keys = std::get<RaggedKeys>(inputs.k);
  EXPECT_EQ(keys.tokens, 100);
  EXPECT_EQ(keys.scale, nullptr);
  EXPECT_THAT(keys.starts, ElementsAre(0, 0, 20));
  EXPECT_THAT(keys.ends, ElementsAre(80, 100, 90));
}

TEST(SmokeTrace, AbsentBoundsAreTheEndOfOneContext) {
  const Folder folder;
  Tensors tensors = ragged_input();
  tensors.erase("ks");
  tensors.erase("ke");
  write_tensors(folder / "t", tensors);
  const Trace trace(folder / "t");
  const auto& keys = std::get<RaggedKeys>(trace.inputs().k);
  EXPECT_THAT(keys.starts, ElementsAre(0, 0, 0));
  EXPECT_THAT(keys.ends, ElementsAre(98, 99, 100));
}

TEST(SmokeTrace, QueriesBeforeTheContextSeeNothing) {
  const Folder folder;
  Tensors tensors = ragged_input();
  tensors.erase("ks");
  tensors.erase("ke");
  tensors["k"] = tensor("F32", {1, 64}, std::vector<float>(64));
  write_tensors(folder / "t", tensors);
  const Trace trace(folder / "t");
  EXPECT_THAT(std::get<RaggedKeys>(trace.inputs().k).ends, ElementsAre(0, 0, 1));
}

TEST(SmokeTrace, ReadsPagedKeys) {
  const Folder folder;
  write_tensors(folder / "t", paged_input());
  const Trace trace(folder / "t");
  EXPECT_EQ(trace.inputs().q.tokens, 4);
  const auto& keys = std::get<PagedKeys>(trace.inputs().k);
  EXPECT_EQ(keys.next_n, 2);
  EXPECT_EQ(keys.cache.pages, 5);
  EXPECT_EQ(keys.cache.page_size, 64);
  EXPECT_EQ(keys.max_pages, 2);
  EXPECT_EQ(keys.block_table[2], 4);
  EXPECT_THAT(keys.context_lens, ElementsAre(100, 64));
}

// A file may hold other tensors, of any dtype.
TEST(SmokeTrace, OtherTensorsMayStandBeside) {
  const Folder folder;
  for (const auto& input : {ragged_input, paged_input}) {
    Tensors tensors = input();
    write_tensors(folder / "alone", tensors);
    tensors["indices"] = tensor<std::int32_t>("I32", {2}, {1, 2});
    tensors["a"] = tensor<std::uint8_t>("F4", {3, 2}, {1, 2, 3});
    tensors["model.rope\n"] = tensor<double>("C64", {}, {0});
    tensors["z"] = tensor<std::uint8_t>("F8_E4M3FNUZ", {0, 5}, {});
    write_tensors(folder / "t", tensors);
    const Trace alone(folder / "alone");
    const Trace trace(folder / "t");
    EXPECT_EQ(trace.inputs().q.tokens, alone.inputs().q.tokens);
    EXPECT_EQ(trace.inputs().w.data[11], alone.inputs().w.data[11]);
    EXPECT_EQ(trace.inputs().shape().max_keys, alone.inputs().shape().max_keys);
  }
}

TEST(SmokeTrace, AttentionIsOfWhatTheQuerySees) {
  const Folder folder;
  // 33 queries over 40 keys; column s of row i holds s + i, and query 32 sees the keys 30 to 32.
  std::vector<std::uint16_t> attention;
  for (int i = 0; i < 32; ++i) {
    for (int s = 0; s < 40; ++s) {
      attention.push_back(float_to_bf16(static_cast<float>(s + i)));
    }
  }
  std::vector<std::int32_t> starts(33, 0);
  std::vector<std::int32_t> ends(33, 40);
  starts[32] = 30;
  ends[32] = 33;
  write_tensors(folder / "t", {{"q", tensor("F32", {33, 1, 64}, std::vector<float>(33 * 64))},
                               {"w", tensor("F32", {33, 1}, std::vector<float>(33))},
                               {"k", tensor("F32", {40, 64}, std::vector<float>(40 * 64))},
                               {"ks", tensor("I32", {33}, starts)},
                               {"ke", tensor("I32", {33}, ends)},
                               {"attn_last32", tensor("BF16", {32, 40}, attention)}});
  const Trace trace(folder / "t");
  EXPECT_FALSE(trace.has_attention(0));
  EXPECT_TRUE(trace.has_attention(1));
  EXPECT_THAT(trace.attention(32), ElementsAre(61, 62, 63));
}

TEST(SmokeTrace, TakesTheLayerFromItsMetadataOrName) {
  const Folder folder;
  const auto layer = [&](std::string_view name) {
    write_tensors(folder / name, ragged_input());
    return Trace(folder / name).layer();
  };
  EXPECT_EQ(layer("trace_h64_layer13.safetensors"), "13");
  EXPECT_EQ(layer("layer7_books.safetensors"), "7");
  EXPECT_EQ(layer("layer_10.safetensors"), "10");
  EXPECT_EQ(layer("layer.2.safetensors"), "2");
  EXPECT_EQ(layer("layer__2.safetensors"), "layer__2");
  EXPECT_EQ(layer("my_layers.safetensors"), "my_layers");
  EXPECT_EQ(layer("books.safetensors"), "books");
}

}  // namespace
}  // namespace misa::cli
