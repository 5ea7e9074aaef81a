# SPDX-License-Identifier: Apache-2.0
# What the library is built on: the targets of a parent project that has them, otherwise the system's
# packages; scripts/install-deps.sh names them for Debian.
if(NOT TARGET TBB::tbb)
  find_package(TBB QUIET)
endif()
if(NOT TARGET fmt::fmt)
  find_package(fmt QUIET)
endif()
set(MISA_HWY hwy::hwy)
if(NOT TARGET hwy::hwy)
  # Debian 12's hwy-config.cmake points at a prefix that does not hold the headers, so pkg-config.
  set(MISA_HWY PkgConfig::MISA_HWY)
  find_package(PkgConfig REQUIRED)
  pkg_check_modules(MISA_HWY QUIET IMPORTED_TARGET libhwy)
endif()
foreach(target TBB::tbb fmt::fmt ${MISA_HWY})
  if(NOT TARGET ${target})
    message(FATAL_ERROR
      "${target} was not found: scripts/install-deps.sh installs its library on Debian 12")
  endif()
endforeach()

# The C++ runtime. CMake links it by itself where a project enables C++; others are told by name. What
# is left out every compiler's linker has.
set(MISA_CXX_RUNTIME ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER MISA_CXX_RUNTIME EXCLUDE REGEX "^(c|gcc|gcc_s)$")
list(REMOVE_DUPLICATES MISA_CXX_RUNTIME)
