// SPDX-License-Identifier: Apache-2.0
// An output file that appears under its name complete or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "interruption.hpp"

namespace misa::cli {

// Writes to a temporary file in the same folder, which is removed if commit is not called, also
// when the process ends by a signal that can be handled. At most one instance may exist.
class OutputFile {
 public:
  // Throws Error if a file of this name cannot be created.
  explicit OutputFile(std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Reserves space for the whole file, if the file system can, so that a full disk is reported
  // before the work.
  void reserve(std::uint64_t bytes);

  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);

  // Syncs the file to disk and renames it to its final name.
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
