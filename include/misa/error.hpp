// SPDX-License-Identifier: Apache-2.0
/// \file
/// The one exception type of the C++ interface.
#pragma once

#include <stdexcept>
#include <string>

namespace misa {

enum class ErrorCode {
  invalid_argument = 1,  ///< a shape, dtype, stride, value or pointer is wrong
  unsupported = 2,       ///< no backend of this build or machine can do it
  workspace = 3,         ///< the workspace or its cap is too small
  io = 4,                ///< a file could not be read or written
  internal = 5,          ///< a defect of this library
};

/// Thrown by every function of this library that can fail. The message names the argument, the
/// expected value and the actual one.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}

  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace misa
