# Everything comes from the system's packages; scripts/install-deps.sh names them for Debian.
find_package(Threads REQUIRED)
find_package(TBB REQUIRED)
find_package(fmt REQUIRED)
find_package(PkgConfig REQUIRED)
# Debian 12's hwy-config.cmake points at a prefix that does not hold the headers, so pkg-config.
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
