# Everything comes from the system's packages; scripts/install-deps.sh names them for Debian.
find_package(Threads REQUIRED)
find_package(TBB QUIET)
find_package(fmt QUIET)
find_package(PkgConfig REQUIRED)
# Debian 12's hwy-config.cmake points at a prefix that does not hold the headers, so pkg-config.
pkg_check_modules(HWY QUIET IMPORTED_TARGET libhwy)
foreach(library TBB fmt HWY)
  if(NOT ${library}_FOUND)
    message(FATAL_ERROR "${library} was not found: scripts/install-deps.sh installs it on Debian 12")
  endif()
endforeach()
