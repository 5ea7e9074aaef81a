#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds everything with sanitizers and runs the tests whose names contain Smoke. The preset asan
# (address and undefined behaviour) is built by clang, and clang-tidy and the fuzzers use it too;
# tsan (threads) is built by GCC.
set -euo pipefail
export TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp"
scripts/venv.sh
for preset in asan tsan; do
  cmake --preset "$preset" >/dev/null
  cmake --build --preset "$preset"
  ctest --preset "$preset" -R Smoke
done
