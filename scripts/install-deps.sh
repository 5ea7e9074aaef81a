#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing to build, test and check MISA on Debian 12, as root or through sudo.
#   scripts/install-deps.sh            what `make demo` and `make test` need
#   scripts/install-deps.sh bench      and Google Benchmark and oneDNN
#   scripts/install-deps.sh check      and the formatter, the linter, clang and its sanitizer runtimes
#   scripts/install-deps.sh docs       and Doxygen
#   scripts/install-deps.sh page       and a browser to test the HTML page in, 200 MB to fetch
#   scripts/install-deps.sh python     and what builds the Python package
#   scripts/install-deps.sh wheel      and what unpacks the Debian 13 that wheels are checked in
set -euo pipefail

packages=(
  g++ make cmake ninja-build ccache pkg-config git
  libhwy-dev libtbb-dev libfmt-dev libcli11-dev nlohmann-json3-dev libmd-dev libgtest-dev libgmock-dev
  help2man groff-base
)
for group in "$@"; do
  case "$group" in
    # oneDNN's CMake package asks for OpenCL, which its Debian package only recommends.
    bench) packages+=(libbenchmark-dev libdnnl-dev ocl-icd-opencl-dev) ;;
    check) packages+=(clang clang-format clang-tidy libclang-rt-dev) ;;
    docs) packages+=(doxygen) ;;
    page) packages+=(chromium fonts-dejavu-core) ;;
    python) packages+=(python3-dev python3-venv) ;;
    wheel) packages+=(mmdebstrap) ;;
    *) echo "install-deps.sh: expected bench, check, docs, page, python or wheel, got '$group'" >&2; exit 2 ;;
  esac
done

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

sudo=()
[ "$(id -u)" -eq 0 ] || sudo=(sudo)
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
