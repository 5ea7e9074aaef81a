#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs every fuzzer for FUZZ_SECONDS (default 30), starting from its corpus.
set -euo pipefail
fuzzers=()
for source in tests/fuzz/*.cpp; do
  fuzzers+=("$(basename "$source" .cpp)")
done
scripts/venv.sh
cmake --preset asan >/dev/null
cmake --build --preset asan --target "${fuzzers[@]/#/misa_fuzz_}"
for name in "${fuzzers[@]}"; do
  found=build/asan/found/$name
  mkdir -p "$found"
  "build/asan/tests/fuzz/misa_fuzz_$name" -max_total_time="${FUZZ_SECONDS:-30}" -verbosity=0 \
    -artifact_prefix="$found/" "$found" "tests/fuzz/corpus/$name"
  echo "fuzz $name: no finding in ${FUZZ_SECONDS:-30} s"
done
