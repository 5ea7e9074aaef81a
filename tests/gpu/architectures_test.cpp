// SPDX-License-Identifier: Apache-2.0
// What this build says that it can run is what its fat binaries hold. Needs no device.
//
// The linker puts the fat binary of every compiled .cu file into the section .nv_fatbin of the
// program. A fat binary is a header (magic, version, header size, size of what follows) and entries
// behind it: kind (1: PTX, 2: machine code), version, header size, payload size, …, and at byte 28
// the architecture.
#include <gmock/gmock.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cuda/architectures.hpp"
#include "cuda/target.hpp"

namespace misa::cuda {
namespace {

using ::testing::HasSubstr;

template <class T>
T read(const std::string& bytes, std::size_t at) {
  T value{};
  if (at + sizeof value > bytes.size()) {
    throw std::out_of_range("the file ends before byte " + std::to_string(at));
  }
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

// The bytes of a section of a 64-bit ELF file.
std::string section(const std::string& elf, const std::string& name) {
  constexpr std::size_t kNameField = 0;
  constexpr std::size_t kOffsetField = 24;
  constexpr std::size_t kSizeField = 32;
  const auto headers = read<std::uint64_t>(elf, 40);
  const auto entry = read<std::uint16_t>(elf, 58);
  const auto count = read<std::uint16_t>(elf, 60);
  const auto header = [&](std::size_t i) { return headers + i * entry; };
  const auto names = read<std::uint64_t>(elf, header(read<std::uint16_t>(elf, 62)) + kOffsetField);
  for (std::size_t i = 0; i < count; ++i) {
    if (name == elf.c_str() + names + read<std::uint32_t>(elf, header(i) + kNameField)) {
      return elf.substr(read<std::uint64_t>(elf, header(i) + kOffsetField),
                        read<std::uint64_t>(elf, header(i) + kSizeField));
    }
  }
  return {};
}

using FatBinary = std::vector<Architecture>;  // what it holds

std::vector<FatBinary> fat_binaries(const std::string& bytes) {
  constexpr std::uint32_t kMagic = 0xBA55ED50;
  constexpr std::uint16_t kPtx = 1;
  std::vector<FatBinary> all;
  for (std::size_t at = 0; at + 16 <= bytes.size();) {
    if (read<std::uint32_t>(bytes, at) != kMagic) {
      at += 8;  // padding between them
      continue;
    }
    std::size_t entry = at + read<std::uint16_t>(bytes, at + 6);
    const std::size_t end = entry + read<std::uint64_t>(bytes, at + 8);
    FatBinary held;
    while (entry < end) {
      const bool ptx = read<std::uint16_t>(bytes, entry) == kPtx;
      const auto capability = static_cast<int>(read<std::uint32_t>(bytes, entry + 28));
      held.push_back({capability, !ptx, ptx, false});
      entry += read<std::uint32_t>(bytes, entry + 4) + read<std::uint64_t>(bytes, entry + 8);
    }
    all.push_back(held);
    at = end;
  }
  return all;
}

// Of this program, which the library is linked into.
std::vector<FatBinary> own_fat_binaries() {
  std::ifstream file("/proc/self/exe", std::ios::binary);
  const std::string elf{std::istreambuf_iterator<char>(file), {}};
  return fat_binaries(section(elf, ".nv_fatbin"));
}

const Target& target(std::string_view name) {
  return *std::ranges::find(targets(), name, &Target::name);
}

// Every file of kernels that all devices share has code for what cuda-generic claims and for
// nothing else, every file of Hopper's own for 9.0 alone.
TEST(Architectures, WhatIsClaimedIsWhatTheFatBinariesHold) {
  const std::vector<FatBinary> all = own_fat_binaries();
  ASSERT_EQ(all.size(), MISA_KERNEL_FILES + MISA_SM90_KERNEL_FILES);
  for (const int capability : {75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121, 130}) {
    const auto serving = std::ranges::count_if(
        all, [&](const FatBinary& held) { return any_serves(held, capability); });
    const bool generic = runs_on(target("cuda-generic"), capability);
    EXPECT_EQ(serving,
              (generic ? MISA_KERNEL_FILES : 0) + (capability == 90 ? MISA_SM90_KERNEL_FILES : 0))
        << capability;
    EXPECT_EQ(runs_on(target("cuda-sm90"), capability), generic && capability == 90) << capability;
  }
}

TEST(Architectures, TheDefaultListServesEveryDeviceFrom80On) {
  const auto list = parse_architectures(MISA_DEFAULT_CUDA_ARCHITECTURES);
  for (const int capability : {80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121, 130}) {
    EXPECT_TRUE(any_serves(list, capability)) << capability;
  }
  EXPECT_FALSE(any_serves(list, 75));
}

TEST(Architectures, ListsReadAsCMakeMeansThem) {
  const auto serves = [](std::string_view list, int capability) {
    return any_serves(parse_architectures(list), capability);
  };
  EXPECT_TRUE(serves("80-real", 80));
  EXPECT_TRUE(serves("80-real", 89));
  EXPECT_FALSE(serves("80-real", 90));
  EXPECT_TRUE(serves("80", 89));
  EXPECT_FALSE(serves("80", 90));  // what is launched there needs code for 9.0
  EXPECT_FALSE(serves("89-virtual", 120));
  EXPECT_FALSE(serves("89-real", 86));
  EXPECT_TRUE(serves("90-virtual", 120));
  EXPECT_TRUE(serves("90", 100));
  EXPECT_FALSE(serves("90", 89));
  EXPECT_TRUE(serves("90a-real", 90));
  EXPECT_FALSE(serves("90a-real", 100));
  EXPECT_FALSE(serves("90a", 100));
  EXPECT_TRUE(serves("80-real,120", 121));
  EXPECT_FALSE(serves("", 90));
}

TEST(Architectures, RequirementsNameWhatIsServed) {
  for (const Target& each : targets()) {
    EXPECT_THAT(each.requirement, HasSubstr(runs_on(each, 90) ? "of compute capability" : "GPU"));
  }
  EXPECT_EQ(runs_on(target("cuda-sm90"), 90),
            target("cuda-sm90").requirement == "a GPU of compute capability 9.0, and a driver");
}

}  // namespace
}  // namespace misa::cuda
