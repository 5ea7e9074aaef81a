#include "program.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>

namespace misa::cli {
namespace {

namespace fs = std::filesystem;

// Forks and becomes misa; stdout and stderr go to these files.
pid_t spawn(std::vector<std::string> arguments, const std::string& out, const std::string& err,
            std::optional<std::uint64_t> file_limit) {
  arguments.insert(arguments.begin(), MISA_PROGRAM);
  std::vector<char*> argv;
  for (std::string& argument : arguments) {
    argv.push_back(argument.data());
  }
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(::open(out.c_str(), O_WRONLY | O_CREAT, 0600), STDOUT_FILENO);
    ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0600), STDERR_FILENO);
    if (file_limit) {
      const rlimit limit{*file_limit, *file_limit};
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    ::execv(argv.front(), argv.data());
    ::_exit(127);
  }
  return child;
}

std::vector<float> normal(std::int64_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<std::size_t>(count));
  std::generate(values.begin(), values.end(), [&] { return distribution(random); });
  return values;
}

}  // namespace

Folder::Folder() {
  std::string name = fs::temp_directory_path() / "misa-test-XXXXXX";
  path_ = ::mkdtemp(name.data());
}

Folder::~Folder() { fs::remove_all(path_); }

std::vector<std::string> Folder::names() const {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(path_)) {
    names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

Outcome run_misa(std::vector<std::string> arguments, std::optional<std::uint64_t> file_limit) {
  const Folder folder;
  const std::string out = folder / "out";
  const std::string err = folder / "err";
  int status = 0;
  ::waitpid(spawn(std::move(arguments), out, err, file_limit), &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_bytes(out), read_bytes(err)};
}

pid_t start_misa(std::vector<std::string> arguments) {
  return spawn(std::move(arguments), "/dev/null", "/dev/null", std::nullopt);
}

void write_tensors(const std::string& path, const Tensors& tensors) {
  std::vector<TensorInfo> infos;
  for (const auto& [name, tensor] : tensors) {
    infos.push_back(tensor_info(name, tensor.dtype, tensor.shape));
  }
  SafetensorsWriter file(path, infos, {});
  for (const auto& [name, tensor] : tensors) {
    file.append(name, tensor.bytes);
  }
  file.commit();
}

Tensors read_tensors(const std::string& path) {
  const SafetensorsReader file(path);
  Tensors tensors;
  for (const TensorInfo& info : file.tensors()) {
    const Buffer data = file.read(info);
    tensors[info.name] = {info.dtype, info.shape, {data.data(), data.data() + data.size()}};
  }
  return tensors;
}

void write_raw(const std::string& path, std::string_view header, std::string_view data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) {
    bytes += static_cast<char>(header.size() >> (8 * i) & 0xff);
  }
  write_bytes(path, bytes.append(header).append(data));
}

void write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), std::ssize(bytes));
}

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

Tensors ragged_input() {
  return {{"q", tensor("F32", {3, 4, 64}, normal(3 * 4 * 64, 1))},
          {"w", tensor("F32", {3, 4}, normal(3 * 4, 2))},
          {"k", tensor("F32", {100, 64}, normal(100 * 64, 3))},
          {"ks", tensor<std::int32_t>("I32", {3}, {0, 0, 20})},
          {"ke", tensor<std::int32_t>("I32", {3}, {80, 100, 90})}};
}

Tensors paged_input() {
  std::vector<std::uint8_t> cache(5 * 64 * 68);
  for (std::size_t i = 0; i < cache.size(); ++i) {
    cache[i] = static_cast<std::uint8_t>(i * 37 % 0x70);  // no NaN, neither here nor as a scale
  }
  return {{"q", tensor("F32", {2, 2, 4, 64}, normal(2 * 2 * 4 * 64, 1))},
          {"w", tensor("F32", {2, 2, 4}, normal(2 * 2 * 4, 2))},
          {"cache", tensor("U8", {5, 64, 68}, cache)},
          {"block_table", tensor<std::int32_t>("I32", {2, 2}, {3, 1, 4, -1})},
          {"context_lens", tensor<std::int32_t>("I32", {2}, {100, 64})}};
}

}  // namespace misa::cli
