# SPDX-License-Identifier: Apache-2.0
# The libraries that misa uses: the targets of a parent project that has them, otherwise the
# system's packages; scripts/install-deps.sh names them for Debian.
if(NOT TARGET TBB::tbb)
  find_package(TBB QUIET)
endif()
if(NOT TARGET fmt::fmt)
  find_package(fmt QUIET)
endif()
set(MISA_HWY hwy::hwy)
if(NOT TARGET hwy::hwy)
  # pkg-config, because Debian 12's hwy-config.cmake names a prefix without the headers.
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

# The C++ runtime. CMake links it where a project enables C++; other projects have to name it. The
# libraries that are excluded are linked by every compiler.
set(MISA_CXX_RUNTIME ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER MISA_CXX_RUNTIME EXCLUDE REGEX "^(c|gcc|gcc_s)$")
list(REMOVE_DUPLICATES MISA_CXX_RUNTIME)
