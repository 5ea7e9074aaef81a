// SPDX-License-Identifier: Apache-2.0
// Running the built program, and the files that it is given.
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

// A folder of its own for a test, removed with it.
class Folder {
 public:
  Folder();
  ~Folder();
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  [[nodiscard]] std::string operator/(std::string_view name) const { return path_ / name; }
  [[nodiscard]] std::vector<std::string> names() const;  // what it holds, sorted

 private:
  std::filesystem::path path_;
};

// What a standard stream of the program leads to: what the tests give it, nothing at all, a disk
// without room, or a pipe whose other end is closed.
enum class Stream { given, closed, full, broken };

// What the program finds around itself.
struct Surroundings {
  Stream in = Stream::given;
  Stream out = Stream::given;
  Stream err = Stream::given;
  std::string terminal{};                     // stderr in place of a file, if there is one
  std::vector<int> ignored{};                 // signals that whoever starts it ignores
  std::optional<std::uint64_t> file_limit{};  // beyond which no file may grow
  bool no_threads = false;                    // none but its first can be made
};

struct Outcome {
  int code;    // of the exit, or -1 if a signal ended it
  int signal;  // that ended it, or 0
  std::string out;
  std::string err;
};

// Runs misa with these arguments.
Outcome run_misa(std::vector<std::string> arguments, const Surroundings& surroundings = {});

// Starts misa without waiting for it; its output is dropped.
pid_t start_misa(std::vector<std::string> arguments, const Surroundings& surroundings = {});

// Waits for it to end.
Outcome wait_for(pid_t child);

// A tensor as a file holds it, and files made of them.
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

// A file of exactly these parts; the header's length is told as it is.
void write_raw(const std::string& path, std::string_view header, std::string_view data);
void write_bytes(const std::string& path, std::string_view bytes);
std::string read_bytes(const std::string& path);

// Small valid inputs: 3 queries, 4 heads of 64, 100 keys; paged: 2 sequences of up to 2 pages of 5,
// 2 queries each.
Tensors ragged_input();
Tensors paged_input();

}  // namespace misa::cli
