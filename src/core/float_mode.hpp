// SPDX-License-Identifier: Apache-2.0
// The floating-point mode that every result is computed in, whatever mode the calling thread is in.
#pragma once

#include <cstdint>

namespace misa {

// While one lives, its thread rounds to nearest, keeps subnormal numbers and traps nothing, as
// IEEE 754 has it by default; then the caller's mode is restored.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : before_(read()) { write(kDefault); }
  ~DefaultFloatMode() { write(before_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  // The memory clobbers keep what is computed from memory on its side of a change.
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
  // No mode is known here that a thread could be left in.
  using Bits = int;
  static constexpr Bits kDefault = 0;
  static Bits read() { return kDefault; }
  static void write(Bits /*bits*/) {}
#endif

  Bits before_;
};

}  // namespace misa
