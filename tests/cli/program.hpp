// SPDX-License-Identifier: Apache-2.0
// Runs the built program and writes its input files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "safetensors.hpp"

namespace misa::cli {

// A temporary folder, removed by the destructor.
class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  [[nodiscard]] std::string operator/(std::string_view name) const { return path_ / name; }
  [[nodiscard]] std::vector<std::string> names() const;  // of its entries, sorted

 private:
  std::filesystem::path path_;
};

// What a standard stream of the program is: the tests' file, closed, a full disk, or a pipe whose
// other end is closed.
enum class Stream { given, closed, full, broken };

// The environment that the program is started in.
struct Surroundings {
  Stream in = Stream::given;
  Stream out = Stream::given;
  Stream err = Stream::given;
  std::string terminal{};                     // used as stderr if not empty
  std::vector<int> ignored{};                 // signals that the parent process ignores
  std::optional<std::uint64_t> file_limit{};  // the size that no file may exceed, bytes
  bool no_threads = false;                    // no thread beside the first can be created
};

struct Outcome {
  int code;    // exit code, or -1 if a signal ended the program
  int signal;  // the signal that ended it, or 0
  std::string out;
  std::string err;
};

// What was written to stderr without the lines that say how busy the machine is, which no test
// decides.
std::string without_warnings(const std::string& err);

// Runs misa with these arguments.
Outcome run_misa(std::vector<std::string> arguments, const Surroundings& surroundings = {});

// Starts misa without waiting for it; its output is dropped.
pid_t start_misa(std::vector<std::string> arguments, const Surroundings& surroundings = {});

// Waits until the process ends.
Outcome wait_for(pid_t child);

// A tensor of a safetensors file, and the tensors of a file by name.
struct Tensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> bytes;
};
using Tensors = std::map<std::string, Tensor>;

template <class T>
Tensor tensor(std::string dtype, std::vector<std::int64_t> shape, const std::vector<T>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {std::move(dtype), std::move(shape), {bytes.begin(), bytes.end()}};
}

template <class T>
std::vector<T> values_of(const Tensor& tensor) {
  const auto* data = reinterpret_cast<const T*>(tensor.bytes.data());
  return {data, data + tensor.bytes.size() / sizeof(T)};
}

void write_tensors(const std::string& path, const Tensors& tensors);
Tensors read_tensors(const std::string& path);

// Writes a file of this header, with its true length before it, and this data.
void write_raw(const std::string& path, std::string_view header, std::string_view data);
void write_bytes(const std::string& path, std::string_view bytes);
std::string read_bytes(const std::string& path);

// Small valid inputs: 3 queries, 4 heads of 64, 100 keys; paged: 2 sequences of up to 2 pages of 5,
// 2 queries each.
Tensors ragged_input();
Tensors paged_input();

}  // namespace misa::cli
