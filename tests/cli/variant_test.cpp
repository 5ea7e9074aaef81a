// SPDX-License-Identifier: Apache-2.0
// Parsing the command line's names of indexers.
#include "variant.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "misa/error.hpp"

namespace misa::cli {
namespace {

TEST(Variant, NamesAloneAreThePublishedSettings) {
  const Variant misa = parse_variant("misa", 512);
  EXPECT_EQ(misa.label, "MISA 8");
  EXPECT_EQ(misa.config.router, Router::pooled);
  EXPECT_EQ(misa.config.top_k, 512);
  EXPECT_EQ(parse_variant("dsa", 512).label, "DSA");
  EXPECT_EQ(parse_variant("misa-dagger", 512).label, "MISA† 8 m=8192");
  EXPECT_EQ(parse_variant("misa-r", 512).label, "MISA-R 7+1");
  EXPECT_EQ(parse_variant("hisa", 512).label, "HISA 64×128");
  EXPECT_EQ(parse_variant("auto", 512).label, "Auto 3+1 m=1024");
  EXPECT_EQ(parse_variant("auto", 512).config.dense_work, 512 * 512);
}

TEST(Variant, SettingsOverrideThem) {
  const Variant routed = parse_variant("misa-r:h=3:m=2k", 1024);
  EXPECT_EQ(routed.label, "MISA-R 3+1 m=2048");
  EXPECT_EQ(routed.config.heads, 3);
  EXPECT_EQ(routed.config.candidates, 2048);
  const Variant sketched = parse_variant("misa-r:h=3:m=4k:sketch=2", 1024);
  EXPECT_EQ(sketched.label, "MISA-R 3+1 m=4096 2-bit");
  EXPECT_EQ(sketched.config.sketch, 2);
  EXPECT_EQ(parse_variant("dsa:m=2k:sketch=4", 1024).label, "DSA m=2048 4-bit");
  EXPECT_EQ(parse_variant("dsa:sketch=4", 1024).config.candidates, 2 * 1024);
  EXPECT_EQ(parse_variant("misa-dagger:sketch=2", 1024).config.candidates, 8 * 1024);
  EXPECT_EQ(parse_variant("misa-r:sketch=2:m=0", 1024).config.candidates, 0);
  EXPECT_EQ(parse_variant("dsa:sketch=2", 2'000'000'000).config.candidates,
            std::numeric_limits<int>::max());
  EXPECT_EQ(parse_variant("misa:m=3000", 1024).config.candidates, 3000);
  const Variant by_length = parse_variant("auto:dense=300k", 1024);
  EXPECT_EQ(by_length.label, "Auto 3+1 m=2048 dense=307200");
  EXPECT_EQ(by_length.config.dense_work, 307200);
  EXPECT_EQ(parse_variant("misa:dense=9999", 1024).label, "MISA 8 dense=9999");
  EXPECT_EQ(parse_variant("misa:B=512", 1024).config.block, 512);
  EXPECT_EQ(parse_variant("misa:router=self", 1024).label, "MISA 8 self");
  const Variant hisa = parse_variant("hisa:B=64:blocks=32", 1024);
  EXPECT_EQ(hisa.config.filter_block, 64);
  EXPECT_EQ(hisa.config.filter_blocks, 32);
}

TEST(Variant, SaysWhatIsWrong) {
  const auto message = [](const char* text) -> std::string {
    try {
      parse_variant(text, 1024);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message("misa:h=x"), "--indexers: misa:h=x: expected a number after h=, got 'x'");
  EXPECT_EQ(message("misa:m=9999999k"),
            "--indexers: misa:m=9999999k: expected a number after m=, got '9999999k'");
  EXPECT_EQ(message("misa:h=2k"), "--indexers: misa:h=2k: expected a number after h=, got '2k'");
  EXPECT_EQ(message("misa:h=-2"), "--indexers: misa:h=-2: expected a number after h=, got '-2'");
  EXPECT_EQ(message("misa:m"), "--indexers: misa:m: expected a number after m=, got ''");
  EXPECT_EQ(
      message("misa:heads=8"),
      "--indexers: misa:heads=8: expected h=, m=, sketch=, dense=, B=, blocks= or router=, got "
      "'heads=8'");
  EXPECT_EQ(message("best"),
            "--indexers: indexer: expected dsa, misa, misa-dagger, misa-r, hisa, auto, got 'best'");
}

}  // namespace
}  // namespace misa::cli
