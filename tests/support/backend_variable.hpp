// SPDX-License-Identifier: Apache-2.0
// The environment variable MISA_BACKEND in a test.
#pragma once

#include <cstdlib>
#include <string>

namespace misa::test {

// Set while one lives; then as it was before.
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
