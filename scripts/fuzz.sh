#!/usr/bin/env bash
# Runs every fuzzer for FUZZ_SECONDS (default 30), starting from its corpus.
set -euo pipefail
cmake --preset fuzz >/dev/null
cmake --build --preset fuzz --target misa_fuzzers
for fuzzer in build/fuzz/tests/fuzz/fuzz_*; do
  [ -x "$fuzzer" ] && [ ! -d "$fuzzer" ] || continue
  name=$(basename "$fuzzer")
  found=$(mktemp -d)
  "$fuzzer" "$found" "tests/fuzz/corpus/${name#fuzz_}" \
    -max_total_time="${FUZZ_SECONDS:-30}" -print_final_stats=0 -verbosity=0 -rss_limit_mb=4096
  echo "$name: ${FUZZ_SECONDS:-30} s without a finding"
  rm -rf "$found"
done
