// SPDX-License-Identifier: Apache-2.0
// Reading and writing safetensors files: an 8-byte header length, a JSON header that names each
// tensor's dtype, shape and place, then the tensors' bytes. Members of a tensor's entry that the
// format does not define are ignored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "buffer.hpp"
#include "output_file.hpp"

namespace misa::cli {

struct TensorInfo {
  std::string name;
  std::string dtype;  // as the format spells it, e.g. "BF16"
  std::vector<std::int64_t> shape;
  std::uint64_t offset = 0;  // from the end of the header
  std::uint64_t bytes = 0;
};

// A tensor to be written; the writer sets its offset.
TensorInfo tensor_info(std::string name, std::string dtype, std::vector<std::int64_t> shape);

using Metadata = std::map<std::string, std::string>;

// "F32 [54, 64]", the form of a tensor in messages and listings.
std::string describe(std::string_view dtype, std::span<const std::int64_t> shape);

// A file whose header has been checked: every dtype is known, and the tensors cover the file's
// bytes exactly, without gap or overlap.
class SafetensorsReader {
 public:
  // Throws Error, naming the file and the tensor, if the file cannot be read or is malformed.
  explicit SafetensorsReader(const std::string& path);
  ~SafetensorsReader();
  SafetensorsReader(const SafetensorsReader&) = delete;
  SafetensorsReader& operator=(const SafetensorsReader&) = delete;

  [[nodiscard]] const std::vector<TensorInfo>& tensors() const { return tensors_; }  // by offset
  [[nodiscard]] const TensorInfo* find(std::string_view name) const;  // null if there is none
  [[nodiscard]] const Metadata& metadata() const { return metadata_; }
  [[nodiscard]] std::uint64_t file_bytes() const { return file_bytes_; }

  // A copy of a tensor's bytes, aligned even if they are not aligned in the file.
  [[nodiscard]] Buffer read(const TensorInfo& tensor) const;

 private:
  SafetensorsReader(std::string path, int descriptor);
  void read_header();
  void read_at(std::uint64_t offset, std::span<std::byte> out) const;

  std::string path_;
  int descriptor_;
  std::uint64_t file_bytes_ = 0;
  std::uint64_t data_begin_ = 0;
  std::vector<TensorInfo> tensors_;
  Metadata metadata_;
};

// Writes each tensor in one or more appends. The file appears complete or not at all.
class SafetensorsWriter {
 public:
  // Throws Error if the file cannot be created.
  SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                    const Metadata& metadata);

  // Adds the next bytes of a tensor.
  void append(std::string_view name, std::span<const std::byte> bytes);

  // Must be called after every tensor is complete.
  void commit() { file_.commit(); }

  [[nodiscard]] std::uint64_t file_bytes() const { return file_bytes_; }

 private:
  OutputFile file_;
  std::map<std::string, std::uint64_t, std::less<>> next_;  // where each tensor's next bytes go
  std::uint64_t file_bytes_ = 0;
};

}  // namespace misa::cli
