// SPDX-License-Identifier: Apache-2.0
#include "program.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>

namespace misa::cli {
namespace {

namespace fs = std::filesystem;

// The functions below run between fork and exec.

void place(int opened, int descriptor) {
  if (opened < 0 || ::dup2(opened, descriptor) < 0) {
    ::_exit(127);
  }
}

// `given` and `flags` say which file to open for Stream::given.
void set_stream(int descriptor, Stream stream, const char* given, int flags) {
  const bool reads = descriptor == STDIN_FILENO;
  std::array<int, 2> pipe{};
  switch (stream) {
    case Stream::given: place(::open(given, flags | O_CLOEXEC | O_NOCTTY, 0600), descriptor); break;
    case Stream::closed: ::close(descriptor); break;
    case Stream::full: place(::open("/dev/full", O_RDWR | O_CLOEXEC), descriptor); break;
    case Stream::broken:
      ::pipe2(pipe.data(), O_CLOEXEC);
      place(pipe[reads ? 0 : 1], descriptor);
      ::close(pipe[reads ? 1 : 0]);
      break;
  }
}

// From here on the kernel refuses to create threads and processes, as at a limit on their number.
void refuse_threads() {
  std::array<sock_filter, 5> filter{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAGAIN),
  }};
  const sock_fprog program{filter.size(), filter.data()};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    ::_exit(127);
  }
}

void limit(int resource, rlim_t most) {
  const rlimit limit{most, most};
  ::setrlimit(resource, &limit);
}

// Forks and executes misa; stdout and stderr go to these files unless the surroundings say
// otherwise.
pid_t spawn(std::vector<std::string> arguments, const Surroundings& surroundings,
            const std::string& out, const std::string& err) {
  arguments.insert(arguments.begin(), MISA_PROGRAM);
  std::vector<char*> argv;
  for (std::string& argument : arguments) {
    argv.push_back(argument.data());
  }
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    constexpr int kWrite = O_WRONLY | O_CREAT;
    set_stream(STDIN_FILENO, surroundings.in, "/dev/null", O_RDONLY);
    set_stream(STDOUT_FILENO, surroundings.out, out.c_str(), kWrite);
    set_stream(STDERR_FILENO, surroundings.err, err.c_str(), kWrite);
    limit(RLIMIT_CORE, 0);
    if (surroundings.file_limit) {
      limit(RLIMIT_FSIZE, *surroundings.file_limit);
    }
    for (const int signal : surroundings.ignored) {
      std::signal(signal, SIG_IGN);
    }
    if (surroundings.no_threads) {
      refuse_threads();
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

Outcome run_misa(std::vector<std::string> arguments, const Surroundings& surroundings) {
  const Folder folder;
  const std::string out = folder / "out";
  const std::string err = folder / "err";
  Outcome outcome = wait_for(spawn(std::move(arguments), surroundings, out, err));
  outcome.out = read_bytes(out);
  outcome.err = read_bytes(err);
  return outcome;
}

pid_t start_misa(std::vector<std::string> arguments, const Surroundings& surroundings) {
  const std::string& terminal = surroundings.terminal;
  return spawn(std::move(arguments), surroundings, "/dev/null",
               terminal.empty() ? "/dev/null" : terminal);
}

Outcome wait_for(pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1,
          WIFSIGNALED(status) ? WTERMSIG(status) : 0,
          {},
          {}};
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

std::string without_warnings(const std::string& err) {
  std::string kept;
  std::istringstream lines(err);
  for (std::string line; std::getline(lines, line);) {
    kept += line.starts_with("misa: The machine was busy") ? "" : line + '\n';
  }
  return kept;
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
