// SPDX-License-Identifier: Apache-2.0
// What a bug report should say about a build and the machine that it runs on.
#include <fmt/format.h>
#include <hwy/highway.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/version.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "cpu/quota.hpp"
#include "misa/context.hpp"
#if MISA_HAVE_CUDA
#include "cuda/target.hpp"
#endif

namespace misa {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return {};
#endif
}

std::string operating_system() {
  utsname name{};
  return ::uname(&name) == 0 ? fmt::format("{} {} {}", name.sysname, name.release, name.machine)
                             : std::string();
}

// The text after the colon in the first line of a /proc file that begins with `start`.
std::string line_of(const char* file, std::string_view start) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t colon = line.find(':');
    if (line.starts_with(start) && colon != std::string::npos) {
      const std::size_t value = line.find_first_not_of(" \t", colon + 1);
      return value == std::string::npos ? std::string() : line.substr(value);
    }
  }
  return {};
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);  // NOLINT(concurrency-mt-unsafe): we set no variable
  return value != nullptr ? value : "";
}

}  // namespace

std::vector<Fact> facts() {
  const auto quota = cpu_quota();
  std::vector<Fact> all{
      {"version", std::string(version())},
      {"compiler", compiler()},
      {"build type", MISA_BUILD_TYPE},
      {"highway", fmt::format("{}.{}.{}", HWY_MAJOR, HWY_MINOR, HWY_PATCH)},
      {"onetbb", TBB_runtime_version()},
      {"fmt",
       fmt::format("{}.{}.{}", FMT_VERSION / 10000, FMT_VERSION / 100 % 100, FMT_VERSION % 100)},
      {"system", operating_system()},
      {"processor", line_of("/proc/cpuinfo", "model name")},
      {"processors online", std::to_string(::sysconf(_SC_NPROCESSORS_ONLN))},
      {"processors allowed", std::to_string(tbb::info::default_concurrency())},
      {"cpu quota", quota ? std::to_string(*quota) : "none"},
      {"memory", line_of("/proc/meminfo", "MemTotal")},
      {"MISA_BACKEND", variable("MISA_BACKEND")},
  };
#if MISA_HAVE_CUDA
  const std::vector<Fact> device = cuda::facts();
  all.insert(all.end(), device.begin(), device.end());
#else
  all.push_back({"cuda", "not built"});
#endif
  return all;
}

}  // namespace misa
