// SPDX-License-Identifier: Apache-2.0
// Sets the environment variable MISA_BACKEND in a test.
#pragma once

#include <cstdlib>
#include <string>

namespace misa::test {

// The variable is set while the object lives, and restored afterwards.
class BackendVariable {
 public:
  explicit BackendVariable(const char* value) {
    if (const char* before = std::getenv(kName)) {
      before_ = before;
    }
    ::setenv(kName, value, 1);
  }
  ~BackendVariable() { before_.empty() ? ::unsetenv(kName) : ::setenv(kName, before_.c_str(), 1); }
  BackendVariable(const BackendVariable&) = delete;
  BackendVariable& operator=(const BackendVariable&) = delete;

 private:
  static constexpr const char* kName = "MISA_BACKEND";
  std::string before_;
};

}  // namespace misa::test
