// SPDX-License-Identifier: Apache-2.0
// A floating-point mode in which a framework may call the library.
#pragma once

#include <cfenv>

namespace misa::test {

// While the object lives, its thread rounds towards zero and, on x86-64, flushes subnormal results
// to zero and reads subnormal operands as zero.
class OtherFloatMode {
 public:
  OtherFloatMode() {
    std::fegetenv(&before_);
    std::fesetround(FE_TOWARDZERO);
#if defined(__x86_64__)
    constexpr unsigned kFlushToZero = 0x8000;
    constexpr unsigned kSubnormalsAreZero = 0x0040;
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | kFlushToZero | kSubnormalsAreZero);
#endif
  }
  ~OtherFloatMode() { std::fesetenv(&before_); }
  OtherFloatMode(const OtherFloatMode&) = delete;
  OtherFloatMode& operator=(const OtherFloatMode&) = delete;

 private:
  std::fenv_t before_{};
};

}  // namespace misa::test
