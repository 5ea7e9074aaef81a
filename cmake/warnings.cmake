# SPDX-License-Identifier: Apache-2.0
# Flags that every target of this project is built with; never exported to users.
add_library(misa_flags INTERFACE)
target_compile_options(misa_flags INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
  # GCC 12 sees overlaps in std::string's operator+ that cannot happen (its bug 105651).
  $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>
  # One rounding an operation wherever the code does not ask for a fused one: results must not
  # depend on what the compiler chose to contract.
  -ffp-contract=off)
if(PROJECT_IS_TOP_LEVEL)
  target_compile_options(misa_flags INTERFACE -Werror)  # another compiler's news are not its users'
endif()
if(MISA_SANITIZE)
  target_compile_options(misa_flags INTERFACE -fsanitize=${MISA_SANITIZE} -fno-omit-frame-pointer
    -fno-sanitize-recover=all)
  target_link_options(misa_flags INTERFACE -fsanitize=${MISA_SANITIZE})
endif()
