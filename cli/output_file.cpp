// SPDX-License-Identifier: Apache-2.0
#include "output_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <limits>
#include <system_error>

#include "misa/error.hpp"

namespace misa::cli {
namespace {

namespace fs = std::filesystem;

std::string error_text(int error) { return std::generic_category().message(error); }

}  // namespace

OutputFile::OutputFile(std::string path) : path_(std::move(path)), target_(path_) {
  std::error_code ignored;  // an error of the folder shows when the file is created
  if (fs::path(path_).filename().empty()) {
    fail("expected a file name");
  }
  if (const fs::file_status status = fs::status(path_, ignored); fs::exists(status)) {
    if (!fs::is_regular_file(status)) {
      fail("expected a regular file or none, got something else of that name");
    }
    if (::access(path_.c_str(), W_OK) != 0) {
      fail(error_text(errno));
    }
    target_ = fs::canonical(path_);  // for a link, the file that it points to
  }
  const fs::path folder = fs::path(target_).parent_path();
  for (int attempt = 0; descriptor_ < 0; ++attempt) {
    temporary_ = folder / fmt::format(".misa-{}-{}", ::getpid(), attempt);
    Interruption::Section section;
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor_ >= 0) {
      section.remember(temporary_);  // shorter than PATH_MAX, as open succeeded
    } else if (errno != EEXIST) {
      fail(error_text(errno));
    }
  }
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
    Interruption::Section section;
    ::unlink(temporary_.c_str());
    section.forget();
  }
}

void OutputFile::reserve(std::uint64_t bytes) {
  constexpr std::uint64_t kMost = std::numeric_limits<off_t>::max();  // refused by the kernel
  const auto length = static_cast<off_t>(std::min(bytes, kMost));
  while (::fallocate(descriptor_, 0, 0, length) != 0) {
    if (errno == EOPNOTSUPP) {
      return;
    }
    if (errno != EINTR) {
      fail(error_text(errno));
    }
  }
}

void OutputFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written =
        ::pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written < 0) {
      fail(error_text(errno));
    }
    offset += static_cast<std::uint64_t>(written);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void OutputFile::commit() {
  if (::fsync(descriptor_) != 0) {
    fail(error_text(errno));
  }
  {
    Interruption::Section section;
    if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
      fail(error_text(errno));
    }
    section.forget();
  }
  ::close(descriptor_);
  descriptor_ = -1;
}

void OutputFile::fail(const std::string& what) const {
  throw Error(ErrorCode::io, fmt::format("{}: cannot be written: {}", path_, what));
}

void require_no_overwrite(const std::string& output, std::span<const std::string> inputs) {
  for (const std::string& input : inputs) {
    std::error_code ignored;  // an output that does not exist yet replaces nothing
    if (fs::equivalent(output, input, ignored)) {
      throw Error(ErrorCode::io,
                  fmt::format("{}: expected an output of another name than the input", output));
    }
  }
}

}  // namespace misa::cli
