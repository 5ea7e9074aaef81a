#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds C and C++ programs against an installation with pkg-config's flags, after moving it to
# another prefix.
#   pkg_config.sh INSTALLED WORK_DIR C_COMPILER CXX_COMPILER [FLAGS]
set -euo pipefail
installed=$1 work=$2 cc=$3 cxx=$4 flags=${5:-}
sources=$(cd "$(dirname "$0")/consumer" && pwd)

rm -rf "$work"
mkdir -p "$work"
cp -a "$installed" "$work/moved"
pc=$(find "$work/moved" -name misa.pc)
[ -n "$pc" ]
libdir=$(dirname "$(dirname "$pc")")
export PKG_CONFIG_PATH=$libdir/pkgconfig LD_LIBRARY_PATH=$libdir

# The flags that pkg-config prints have to be split into words.
# shellcheck disable=SC2046,SC2086
{
  $cc -std=c99 $flags $(pkg-config --cflags misa) -c "$sources/consumer.c" -o "$work/c.o"
  $cxx -std=c++20 $flags $(pkg-config --cflags misa) -c "$sources/consumer.cpp" -o "$work/cpp.o"
  for option in "" --static; do
    $cc $flags "$work/c.o" $(pkg-config --libs $option misa) -o "$work/c"
    $cxx $flags "$work/cpp.o" $(pkg-config --libs $option misa) -o "$work/cpp"
    "$work/c"
    "$work/cpp"
  done
}
