// SPDX-License-Identifier: Apache-2.0
// When, by which command and from which files results were made.
#include "provenance.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "misa/error.hpp"
#include "program.hpp"

namespace misa::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// The examples of FIPS 180-2.
TEST(Sha256, IsThatOfTheStandard) {
  const Folder folder;
  write_bytes(folder / "abc", "abc");
  EXPECT_EQ(sha256_of(folder / "abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  write_bytes(folder / "million", std::string(1'000'000, 'a'));
  EXPECT_EQ(sha256_of(folder / "million"),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, NamesAFileThatCannotBeRead) {
  const Folder folder;
  try {
    (void)sha256_of(folder / "absent");
    FAIL() << "a file that is not there was read";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("absent: cannot be read: No such file"));
  }
}

TEST(UtcNow, HasTheFormOfIso8601) {
  EXPECT_THAT(utc_now(), ::testing::MatchesRegex("20..-..-..T..:..:..Z"));
}

TEST(CommandLine, BeginsWithTheNameOfTheProgram) {
  EXPECT_THAT(command_line(), StartsWith("misa_tests_cli"));
}

TEST(CommandLine, IsQuotedForAShell) {
  const Folder folder;
  const std::string file = folder / "the layer's.safetensors";
  write_tensors(file, ragged_input());
  const Outcome outcome = run_misa({"compare", file, "--runs", "0", "--indexers", "dsa", "--json"});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(nlohmann::json::parse(outcome.out).at("command"),
            "misa compare '" + std::string(folder / "the layer'\\''s.safetensors") +
                "' --runs 0 --indexers dsa --json");
}

}  // namespace
}  // namespace misa::cli
