#!/usr/bin/env bash
# Builds the tests with sanitizers and runs the subset whose names hold Smoke.
set -euo pipefail
export TSAN_OPTIONS="suppressions=$PWD/tests/tsan.supp"
for preset in asan tsan; do
  cmake --preset "$preset" >/dev/null
  cmake --build --preset "$preset"
  ctest --preset "$preset" -R Smoke
done
