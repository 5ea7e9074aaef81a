# SPDX-License-Identifier: Apache-2.0
# Flags that every target of this project is built with; never exported to users. The presets make
# errors of warnings; elsewhere compilers may warn of more than the ones that we know.
add_library(misa_flags INTERFACE)
target_compile_options(misa_flags INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
  # GCC 12 sees overlaps in std::string's operator+ that cannot happen (its bug 105651).
  $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>
  # One rounding per operation unless the code asks for a fused one: results must not depend on
  # which operations the compiler fuses.
  -ffp-contract=off)
if(MISA_SANITIZE)
  target_compile_options(misa_flags INTERFACE -fsanitize=${MISA_SANITIZE} -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  target_link_options(misa_flags INTERFACE -fsanitize=${MISA_SANITIZE})
endif()
