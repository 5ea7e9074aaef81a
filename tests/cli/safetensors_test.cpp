// SPDX-License-Identifier: Apache-2.0
// The reader accepts what the format allows and nothing else; a written file appears complete.
#include "safetensors.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "misa/error.hpp"
#include "program.hpp"

namespace misa::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

std::string error_of(const std::string& path) {
  try {
    const SafetensorsReader file(path);
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

std::string error_of_header(std::string_view header, std::string_view data = {}) {
  const Folder folder;
  write_raw(folder / "f", header, data);
  const std::string error = error_of(folder / "f");
  EXPECT_THAT(error, StartsWith(folder / "f: ")) << header;
  return error;
}

// A header with one tensor, x, which has these members.
std::string tensor_header(std::string_view members) {
  return R"({"x":{)" + std::string(members) + "}}";
}

TEST(SmokeSafetensors, ReadsTensorsInTheOrderOfTheirData) {
  const Folder folder;
  write_raw(folder / "f",
            R"({"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]},)"
            R"("__metadata__":{"who":"me"},)"
            R"("a":{"dtype":"I16","shape":[1,2],"data_offsets":[0,4]}}  )",
            "\x01\x02\x03\x04\x05\x06");
  const SafetensorsReader file(folder / "f");
  ASSERT_EQ(file.tensors().size(), 2U);
  EXPECT_EQ(file.tensors()[0].name, "a");
  EXPECT_EQ(file.tensors()[0].dtype, "I16");
  EXPECT_THAT(file.tensors()[0].shape, ElementsAre(1, 2));
  EXPECT_EQ(file.tensors()[1].name, "b");
  EXPECT_EQ(file.find("b"), &file.tensors()[1]);
  EXPECT_EQ(file.find("c"), nullptr);
  EXPECT_THAT(file.metadata(), ElementsAre(std::pair("who", "me")));
  const Buffer b = file.read(*file.find("b"));
  EXPECT_EQ(b.size(), 2U);
  EXPECT_EQ(b.data()[1], std::byte{6});
}

TEST(SmokeSafetensors, AlignsWhatTheFileDoesNot) {
  const Folder folder;
  // 69 bytes of header: 8 + 69 + 1 is no multiple of 2.
  const std::string header = R"({"c":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
  const std::vector<float> values{1.5F, -2.5F};
  write_raw(folder / "f", header,
            "x" + std::string(reinterpret_cast<const char*>(values.data()), 8));
  ASSERT_NE((8 + header.size() + 1) % alignof(float), 0U);
  const Tensors tensors = read_tensors(folder / "f");
  EXPECT_EQ(values_of<float>(tensors.at("f")), values);
  const SafetensorsReader file(folder / "f");
  const Buffer data = file.read(*file.find("f"));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data.data()) % 64, 0U);
}

TEST(SmokeSafetensors, EmptyTensorsMayStandAnywhere) {
  const Folder folder;
  write_raw(folder / "f",
            R"({"b":{"dtype":"F32","shape":[0,7],"data_offsets":[1,1]},)"
            R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
            R"("s":{"dtype":"U8","shape":[],"data_offsets":[1,2]},)"
            R"("c":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})",
            "xy");
  const Tensors tensors = read_tensors(folder / "f");
  EXPECT_THAT(tensors.at("b").bytes, IsEmpty());
  EXPECT_THAT(tensors.at("b").shape, ElementsAre(0, 7));
  EXPECT_EQ(tensors.at("s").bytes.size(), 1U);  // a scalar
}

TEST(SmokeSafetensors, HeaderMayBeEmpty) {
  const Folder folder;
  write_raw(folder / "f", "{}", "");
  EXPECT_THAT(SafetensorsReader(folder / "f").tensors(), IsEmpty());
}

TEST(SmokeSafetensors, RefusesFilesThatAreNone) {
  const Folder folder;
  EXPECT_THAT(error_of(folder / "f"), EndsWith("cannot be read: No such file or directory"));
  EXPECT_THAT(error_of(folder / ""), EndsWith("expected a regular file"));
  write_bytes(folder / "f", "");
  EXPECT_THAT(error_of(folder / "f"),
              EndsWith("expected a safetensors file, of 8 bytes or more, got 0"));
  write_bytes(folder / "f", "1234567");
  EXPECT_THAT(error_of(folder / "f"),
              EndsWith("expected a safetensors file, of 8 bytes or more, got 7"));
}

TEST(SmokeSafetensors, RefusesHeadersThatAreTooLong) {
  const Folder folder;
  write_bytes(folder / "f", std::string("\x03\0\0\0\0\0\0\0{}", 10));
  EXPECT_THAT(error_of(folder / "f"),
              EndsWith("header: expected 2 bytes at most (file of 10), got a length of 3"));
  write_bytes(folder / "f", std::string(8, '\xff') + "{}");
  EXPECT_THAT(error_of(folder / "f"), EndsWith("got a length of 18446744073709551615"));
  // The file is sparse, so it takes no room on the disk.
  write_bytes(folder / "f", std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10));
  std::filesystem::resize_file(folder / "f", 200'000'000);
  EXPECT_THAT(error_of(folder / "f"), HasSubstr("expected 100000000 bytes at most"));
}

// Their first bytes are no length, and are not told as one.
TEST(SmokeSafetensors, RefusesFilesOfOtherFormats) {
  const Folder folder;
  const std::string npy("\x93NUMPY\x01\0v\0{'descr': '<f4'}", 25);
  const std::string zip("PK\x03\x04\x14\0\0\0\x08\0", 10);
  const std::pair<std::string, std::string> files[] = {{npy, R"(\x93NUMPY\x01\x00)"},
                                                       {zip, R"(PK\x03\x04\x14\x00\x00\x00)"},
                                                       {"# A read me\n", "# A read"},
                                                       {"8 bytes.", "8 bytes."}};
  for (const auto& [bytes, begin] : files) {
    write_bytes(folder / "f", bytes);
    EXPECT_THAT(
        error_of(folder / "f"),
        EndsWith("f: expected a safetensors file, got one that begins with '" + begin + "'"));
  }
}

TEST(SmokeSafetensors, RefusesHeadersThatAreNoJsonObject) {
  EXPECT_THAT(error_of_header(""), HasSubstr("header: expected a JSON object"));
  EXPECT_THAT(error_of_header("[]"), HasSubstr("header: expected a JSON object"));
  EXPECT_THAT(error_of_header(" {}"), HasSubstr("header: expected a JSON object"));
  EXPECT_THAT(error_of_header("{"), HasSubstr("header: parse error"));
  EXPECT_THAT(error_of_header("{}{}"), HasSubstr("header: parse error"));
  EXPECT_THAT(error_of_header("{\"\xff\":{}}"), HasSubstr("header: parse error"));
  EXPECT_THAT(error_of_header(R"({"x":1e999})"), HasSubstr("header: number overflow"));
  EXPECT_THAT(error_of_header(std::string_view("{}\0", 3)), EndsWith("got a zero byte"));
}

TEST(SmokeSafetensors, RefusesDeepNesting) {
  const std::string deep(100000, '[');
  EXPECT_THAT(error_of_header(R"({"x":)" + deep), HasSubstr("expected nesting of 127 levels"));
}

TEST(SmokeSafetensors, RefusesNamesThatComeTwice) {
  const std::string x = R"("x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  EXPECT_THAT(error_of_header("{" + x + "," + x + "}", "abcd"),
              EndsWith("header: expected each name once, got 'x' again"));
  EXPECT_THAT(error_of_header(
                  tensor_header(R"("dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4])")),
              EndsWith("header: expected each name once, got 'dtype' again"));
  EXPECT_THAT(error_of_header(
                  tensor_header(R"("shape":[4],"dtype":"U8","data_offsets":[0,4],"shape":[4])")),
              EndsWith("header: expected each name once, got 'shape' again"));
  EXPECT_THAT(error_of_header(R"({"__metadata__":{},"__metadata__":{}})"),
              EndsWith("header: expected each name once, got '__metadata__' again"));
}

TEST(SmokeSafetensors, RefusesTensorsThatAreMalformed) {
  const auto error = [](std::string_view members) {
    return error_of_header(tensor_header(members), "abcd");
  };
  EXPECT_THAT(error_of_header(R"({"x":3})"), HasSubstr("tensor 'x': expected an object"));
  EXPECT_THAT(error(R"("shape":[4],"data_offsets":[0,4])"),
              EndsWith("tensor 'x': expected 'dtype', got none"));
  EXPECT_THAT(error(R"("dtype":"U8","data_offsets":[0,4])"),
              EndsWith("tensor 'x': expected 'shape', got none"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":[4])"),
              EndsWith("tensor 'x': expected 'data_offsets', got none"));
  EXPECT_THAT(error(R"("dtype":"U7","shape":[4],"data_offsets":[0,4])"),
              AllOf(HasSubstr("tensor 'x': expected a dtype of"), EndsWith("got \"U7\"")));
  EXPECT_THAT(error(R"("dtype":8,"shape":[4],"data_offsets":[0,4])"), EndsWith("got 8"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":4,"data_offsets":[0,4])"),
              EndsWith("expected a shape list and two data_offsets, got 4 and [0,4]"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":[4],"data_offsets":[0,4,4])"), EndsWith("[0,4,4]"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":[[4]],"data_offsets":[0,4])"), EndsWith("got [4]"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":[-4],"data_offsets":[0,4])"), EndsWith("got -4"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":[4.0],"data_offsets":[0,4])"), EndsWith("got 4.0"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":["4"],"data_offsets":[0,4])"), EndsWith("\"4\""));
  EXPECT_THAT(error(R"("dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,4])"),
              EndsWith("got 9223372036854775808"));
  EXPECT_THAT(error(R"("dtype":"U8","shape":[4],"data_offsets":[0,true])"), EndsWith("got true"));
}

TEST(SmokeSafetensors, RefusesSizesThatDoNotFit) {
  const auto error = [](std::string_view shape, std::string_view offsets) {
    return error_of_header(
        tensor_header(std::string(R"("dtype":"F32","shape":)") + std::string(shape) +
                      R"(,"data_offsets":)" + std::string(offsets)),
        "abcd");
  };
  EXPECT_THAT(
      error("[2]", "[0,4]"),
      EndsWith("tensor 'x': expected data_offsets 8 bytes apart as F32 [2] takes, got 0 and 4"));
  EXPECT_THAT(error("[1]", "[4,0]"), EndsWith("got 4 and 0"));
  EXPECT_THAT(error("[4294967296,4294967296]", "[0,4]"),
              HasSubstr("tensor 'x': expected a size below 2^64 bytes"));
  // 2^62 elements of 4 bytes wrap to 0.
  EXPECT_THAT(error("[4611686018427387904]", "[0,0]"), HasSubstr("below 2^64 bytes"));
  EXPECT_THAT(error("[0,4294967296,4294967296,4294967296]", "[0,0]"), HasSubstr("file's 4 bytes"));
}

TEST(SmokeSafetensors, RefusesTensorsThatDoNotCoverTheData) {
  const auto error = [](std::string_view a, std::string_view b, std::string_view data) {
    const auto member = [](std::string_view name, std::string_view offsets) {
      return '"' + std::string(name) + R"(":{"dtype":"I16","shape":[1],"data_offsets":)" +
             std::string(offsets) + "}";
    };
    return error_of_header("{" + member("a", a) + "," + member("b", b) + "}", data);
  };
  EXPECT_THAT(
      error("[0,2]", "[1,3]", "xxx"),
      EndsWith("tensor 'b': expected data from byte 2, where the one before it ends, got 1"));
  EXPECT_THAT(error("[0,2]", "[0,2]", "xx"), HasSubstr("tensor '"));
  EXPECT_THAT(error("[0,2]", "[3,5]", "xxxxx"),
              EndsWith("from byte 2, where the one before it ends, got 3"));
  EXPECT_THAT(error("[1,3]", "[3,5]", "xxxxx"), EndsWith("got 1"));
  EXPECT_THAT(error("[0,2]", "[2,4]", "xxx"),
              EndsWith("tensor 'b': expected data inside of the file's 3 bytes, got an end of 4"));
  EXPECT_THAT(error("[0,2]", "[2,4]", "xxxxx"),
              EndsWith("header: expected tensors that fill the file's 5 bytes of data, got 4"));
}

struct Format {
  std::string dtype;
  int bits;
};

// Every dtype of the format; those below 8 bits are packed.
std::vector<Format> formats() {
  return {{"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
          {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
          {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
          {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
          {"I64", 64},        {"U64", 64}};
}

TEST(SmokeSafetensors, ReadsEveryDtypeOfTheFormat) {
  const Folder folder;
  for (const Format& format : formats()) {
    SCOPED_TRACE(format.dtype);
    for (const int elements : {0, 4, 8, 12}) {
      const int bytes = elements * format.bits / 8;
      write_raw(folder / "f",
                tensor_header("\"dtype\":\"" + format.dtype + "\",\"shape\":[2," +
                              std::to_string(elements / 2) + "],\"data_offsets\":[0," +
                              std::to_string(bytes) + "]"),
                std::string(static_cast<std::size_t>(bytes), 'x'));
      const SafetensorsReader file(folder / "f");
      EXPECT_EQ(file.find("x")->dtype, format.dtype);
      EXPECT_EQ(file.find("x")->bytes, bytes);
      EXPECT_EQ(file.read(*file.find("x")).size(), bytes);
      EXPECT_EQ(tensor_info("x", format.dtype, {elements}).bytes, bytes);
    }
  }
}

TEST(SmokeSafetensors, RefusesPartsOfBytes) {
  const auto error = [](std::string_view dtype, std::string_view shape) {
    return error_of_header(tensor_header("\"dtype\":\"" + std::string(dtype) + "\",\"shape\":" +
                                         std::string(shape) + ",\"data_offsets\":[0,1]"),
                           "x");
  };
  EXPECT_THAT(error("F4", "[]"),
              EndsWith("tensor 'x': expected whole bytes, got F4 [] of 4 bits an element"));
  EXPECT_THAT(error("F4", "[3]"), EndsWith("got F4 [3] of 4 bits an element"));
  EXPECT_THAT(error("F6_E2M3", "[2]"), EndsWith("got F6_E2M3 [2] of 6 bits an element"));
  EXPECT_THAT(error("F6_E3M2", "[1]"), EndsWith("got F6_E3M2 [1] of 6 bits an element"));
  // 2^61 elements of 64 bits wrap to 0; of 4 bits they are 2^60 bytes.
  EXPECT_THAT(error("C64", "[2305843009213693952]"), HasSubstr("below 2^64 bytes"));
  EXPECT_THAT(error("F4", "[2305843009213693952]"), HasSubstr("1152921504606846976 bytes apart"));
  EXPECT_THAT(error("C64", "[2305843009213693952,0]"), HasSubstr("expected data_offsets 0 bytes"));
}

// Members of an entry that the format does not define are ignored.
TEST(SmokeSafetensors, PassesOverUnknownMembers) {
  const Folder folder;
  const std::string deep = std::string(125, '[') + std::string(125, ']');
  for (const std::string& more :
       {std::string("1"), std::string("null"), std::string(R"({"dtype":[1.5,-2,true]})"),
        std::string(R"("text","more":2)"), std::string(R"({"a":1,"a":2})"), deep}) {
    write_raw(
        folder / "f",
        tensor_header(R"("more":)" + more + R"(,"dtype":"U8","shape":[4],"data_offsets":[0,4])"),
        "abcd");
    EXPECT_EQ(error_of(folder / "f"), "accepted") << more;
  }
}

TEST(SmokeSafetensors, ReadsMetadataThatTheFormatAllows) {
  const Folder folder;
  const auto read = [&](std::string_view metadata) {
    write_raw(folder / "f",
              R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"__metadata__":)" +
                  std::string(metadata) + "}",
              "x");
    return SafetensorsReader(folder / "f").metadata();
  };
  EXPECT_THAT(read("null"), IsEmpty());
  EXPECT_THAT(read("{}"), IsEmpty());
  EXPECT_THAT(read(R"({"":""})"), ElementsAre(std::pair("", "")));
  EXPECT_THAT(read(R"({"dtype":"a","dtype":"b"})"), ElementsAre(std::pair("dtype", "b")));
  EXPECT_THAT(read(R"({"\u00e9\u0000":"\ud83d\ude00\n"})"),
              ElementsAre(std::pair(std::string("\xc3\xa9\0", 3), "\xf0\x9f\x98\x80\n")));
}

// As many tensors as a large model has: the time to read them grows in proportion.
TEST(SmokeSafetensors, ReadsManyTensors) {
  const Folder folder;
  std::string header;
  constexpr int kTensors = 50000;
  for (int i = 0; i < kTensors; ++i) {
    header += (i == 0 ? "{" : ",") + std::string("\"") + std::to_string(i) +
              R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  write_raw(folder / "f", header + "}", "");
  EXPECT_EQ(SafetensorsReader(folder / "f").tensors().size(), kTensors);
}

TEST(SmokeSafetensors, RefusesMetadataThatIsNoText) {
  EXPECT_THAT(error_of_header(R"({"__metadata__":3})"), HasSubstr("__metadata__: expected"));
  EXPECT_THAT(error_of_header(R"({"__metadata__":{"a":3}})"),
              EndsWith("__metadata__: expected a string for 'a', got number"));
}

TEST(SmokeSafetensors, WritesAlignedTensorsPieceByPiece) {
  const Folder folder;
  {
    SafetensorsWriter file(folder / "f",
                           {tensor_info("bytes", "U8", {3}), tensor_info("half", "BF16", {1}),
                            tensor_info("number", "F32", {2})},
                           {{"odd", "length"}});
    const std::vector<float> number{1, 2};
    const std::uint16_t half = 7;
    file.append("bytes", std::as_bytes(std::span("ab", 2)));
    file.append("number", std::as_bytes(std::span(number)));
    file.append("bytes", std::as_bytes(std::span("c", 1)));
    file.append("half", std::as_bytes(std::span(&half, 1)));
    EXPECT_FALSE(std::filesystem::exists(folder / "f"));
    file.commit();
    EXPECT_EQ(file.file_bytes(), std::filesystem::file_size(folder / "f"));
  }
  EXPECT_THAT(folder.names(), ElementsAre("f"));
  const SafetensorsReader file(folder / "f");
  EXPECT_THAT(file.metadata(), ElementsAre(std::pair("odd", "length")));
  std::uint64_t data_bytes = 0;
  for (const TensorInfo& tensor : file.tensors()) {
    data_bytes += tensor.bytes;
  }
  EXPECT_EQ((file.file_bytes() - data_bytes) % 8, 0U);  // where the data begins
  EXPECT_EQ(file.find("number")->offset % 4, 0U);
  EXPECT_EQ(file.find("half")->offset % 2, 0U);
  const Tensors tensors = read_tensors(folder / "f");
  EXPECT_EQ(values_of<char>(tensors.at("bytes")), (std::vector<char>{'a', 'b', 'c'}));
  EXPECT_EQ(values_of<float>(tensors.at("number")), (std::vector<float>{1, 2}));
}

TEST(SmokeSafetensors, LeavesNothingIfItIsNotCommitted) {
  const Folder folder;
  write_bytes(folder / "f", "old");
  { const SafetensorsWriter file(folder / "f", {tensor_info("x", "U8", {3})}, {}); }
  EXPECT_THAT(folder.names(), ElementsAre("f"));
  EXPECT_EQ(read_bytes(folder / "f"), "old");
}

TEST(SmokeOutputFile, ReplacesWhatALinkPointsTo) {
  const Folder folder;
  write_bytes(folder / "f", "old");
  std::filesystem::create_symlink("f", folder / "link");
  OutputFile file(folder / "link");
  file.write_at(0, std::as_bytes(std::span("new", 3)));
  file.commit();
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link"));
  EXPECT_EQ(read_bytes(folder / "f"), "new");
}

}  // namespace
}  // namespace misa::cli
