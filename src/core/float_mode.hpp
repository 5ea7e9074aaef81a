// SPDX-License-Identifier: Apache-2.0
// The floating-point mode that every result is computed in, whatever mode the caller has set.
#pragma once

#include <cstdint>

namespace misa {

// Sets the default mode of IEEE 754 for the calling thread: round to nearest, keep subnormal
// numbers, trap nothing. The destructor restores the caller's mode.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : before_(read()) { write(kDefault); }
  ~DefaultFloatMode() { write(before_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  // The memory clobbers keep the compiler from moving computations across a change of mode.
#if defined(__x86_64__)
  using Bits = std::uint32_t;
  static constexpr Bits kDefault = 0x1f80;  // MXCSR: every exception masked, nothing else set
  static Bits read() {
    Bits bits = 0;
    asm volatile("stmxcsr %0" : "=m"(bits) : : "memory");
    return bits;
  }
  static void write(Bits bits) { asm volatile("ldmxcsr %0" : : "m"(bits) : "memory"); }
#elif defined(__aarch64__)
  using Bits = std::uint64_t;
  static constexpr Bits kDefault = 0;  // FPCR
  static Bits read() {
    Bits bits = 0;
    asm volatile("mrs %0, fpcr" : "=r"(bits) : : "memory");
    return bits;
  }
  static void write(Bits bits) { asm volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#else
  // On other architectures the mode is neither read nor set.
  using Bits = int;
  static constexpr Bits kDefault = 0;
  static Bits read() { return kDefault; }
  static void write(Bits /*bits*/) {}
#endif

  Bits before_;
};

}  // namespace misa
