// SPDX-License-Identifier: Apache-2.0
// A file that appears under its name whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "interruption.hpp"

namespace misa::cli {

// Written under another name in the same folder, which is removed if commit is not reached, also
// when a signal ends the process that a handler can catch. One at a time.
class OutputFile {
 public:
  // Throws Error if a file of this name cannot be made.
  explicit OutputFile(std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Sets aside what the whole file takes, so that a disk without room is told of before the work,
  // where the file system can.
  void reserve(std::uint64_t bytes);

  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);

  // Brings the bytes to the disk and gives the file its name.
  void commit();

 private:
  [[noreturn]] void fail(const std::string& what) const;

  Interruption interruption_;
  std::string path_;  // as the user wrote it
  std::string target_;
  std::string temporary_;
  int descriptor_ = -1;
};

// Throws Error if a file written under this name would replace one of the inputs.
void require_no_overwrite(const std::string& output, std::span<const std::string> inputs);

}  // namespace misa::cli
