#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds everything with sanitizers and runs the tests whose names hold Smoke. The address and undefined
# sanitizers' build is clang's, the one that clang-tidy and the fuzzers take too; the others are GCC's.
set -euo pipefail
export TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp"
scripts/venv.sh
for preset in asan tsan; do
  cmake --preset "$preset" >/dev/null
  cmake --build --preset "$preset"
  ctest --preset "$preset" -R Smoke
done
