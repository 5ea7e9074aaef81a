// SPDX-License-Identifier: Apache-2.0
#include "provenance.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sha2.h>

#include <array>
#include <cerrno>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <vector>

#include "misa/error.hpp"

namespace misa::cli {
namespace {

std::string shell_word(const std::string& argument) {
  constexpr const char* kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./,:=+@%";
  if (!argument.empty() && argument.find_first_not_of(kPlain) == std::string::npos) {
    return argument;
  }
  std::string text = "'";
  for (const char c : argument) {
    text += c == '\'' ? R"('\'')" : std::string(1, c);
  }
  return text + '\'';
}

}  // namespace

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

std::string command_line() {
  std::ifstream file("/proc/self/cmdline");
  std::vector<std::string> words;
  for (std::string argument; std::getline(file, argument, '\0');) {
    words.push_back(words.empty() ? std::filesystem::path(argument).filename().string()
                                  : shell_word(argument));
  }
  return fmt::format("{}", fmt::join(words, " "));
}

std::string sha256_of(const std::string& file) {
  std::array<char, SHA256_DIGEST_STRING_LENGTH> digits{};
  errno = 0;
  if (::SHA256File(file.c_str(), digits.data()) == nullptr) {
    throw Error(ErrorCode::io, fmt::format("{}: cannot be read: {}", file,
                                           std::generic_category().message(errno)));
  }
  return digits.data();
}

}  // namespace misa::cli
