#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds, tests, sanitises and benchmarks the CUDA backends on a machine with a device.
#   tests/gpu.sh [STAGE...]           builds in build/cuda and runs the stages: test sanitize bench
#                                     (default: all three); python, which tests the package that
#                                     python3 imports on tensors and CuPy's arrays of the device;
#                                     and report, which writes bench/results (scripts/record.py
#                                     has its variables)
#   tests/gpu.sh FOLDER [STAGE...]    the same with the programs found under FOLDER, without building
# Libraries that the machine lacks are looked for in FOLDER/lib.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

case "${1:-test}" in
  test | sanitize | python | bench | report)
    folder=build/cuda
    cmake --preset cuda && cmake --build --preset cuda || exit 2
    ;;
  *)
    folder=$1
    shift
    ;;
esac
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(test sanitize bench)
[ ! -d "$folder/lib" ] || export LD_LIBRARY_PATH="$(realpath "$folder")/lib:${LD_LIBRARY_PATH:-}"

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 2

scratch=$(mktemp -d)
: >"$scratch/summary"
trap 'rm -rf "$scratch"' EXIT

# record NAME COMMAND...: runs the command and adds a line to the summary.
record() {
  local name=$1 start=$SECONDS status=ok
  shift
  echo "== $name"
  "$@" || status=FAILED
  printf '%-40s %-10s %4d s\n' "$name" "$status" $((SECONDS - start)) >>"$scratch/summary"
}

# run NAME PROGRAM ARGUMENTS...: the same for a program under $folder, started by $wrapper.
run() {
  local name=$1 program
  program=$(find "$folder" -type f -name "$2" -perm -u+x | head -n 1)
  record "$name" "${wrapper[@]}" "${program:-$2 is not built}" "${@:3}"
}

# kept NAME PROGRAM ARGUMENTS...: what the program prints goes to bench/results/NAME.json.
kept() {
  local program
  if [[ $2 == *.py ]]; then
    record "$1" python3 scripts/record.py "$1" python3 "bench/gpu/$2" "${@:3}"
  else
    program=$(find "$folder" -type f -name "$2" -perm -u+x | head -n 1)
    record "$1" python3 scripts/record.py "$1" "${program:-$2 is not built}" "${@:3}"
  fi
}

# The same as run, in the background, with its output printed when it ends. At most three run at
# once: a dozen at once take longer than one after the other.
run_parallel() {
  local log="$scratch/${1//\//-}.log"
  while [ "$(jobs -rp | wc -l)" -ge 3 ]; do
    wait -n
  done
  {
    run "$@" >"$log" 2>&1
    cat "$log"
  } &
}

wrapper=(env)
for stage in "${stages[@]}"; do
  case "$stage" in
    test)
      run "misa info" misa info
      run_parallel "tests/indexers" misa_tests_indexers --gtest_brief=1 --gtest_filter='*cuda_*'
      run_parallel "tests/gpu" misa_tests_gpu --gtest_brief=1
      run_parallel "tests/api" misa_tests_api --gtest_brief=1
      MISA_GOLDEN=tests/golden run_parallel "tests/golden" misa_tests_golden --gtest_brief=1 \
        --gtest_filter='*cuda_*'
      wait
      # By itself 100,000 replays, some minutes.
      run "soak" misa_tests_soak --replays 5000 --judged 100
      ;;
    sanitize)
      # One after the other: side by side each takes many times as long.
      for tool in memcheck synccheck initcheck racecheck; do
        wrapper=(compute-sanitizer --tool "$tool" --error-exitcode 1)
        repeats=''
        if [ "$tool" = racecheck ]; then
          # Its memory grew beyond 120 GB in a test that waits for none of its steps, so here every
          # launch is waited for.
          wrapper=(env CUDA_LAUNCH_BLOCKING=1 "${wrapper[@]}")
          # It takes 10 ms or more per launch, so tests that repeat the launches of others
          # thousands of times are left to the other tools.
          repeats='-*MemoryChangesNothing*:*AGraphReplays*'
        fi
        run "$tool tests/gpu" misa_tests_gpu --gtest_brief=1 --gtest_filter="*Smoke*$repeats"
        run "$tool tests/indexers" misa_tests_indexers --gtest_brief=1 \
          --gtest_filter="*Smoke*cuda_*$repeats"
      done
      wrapper=(env)
      ;;
    python)
      # pytest and what a file tests besides the package may be missing, too.
      for module in torch cupy; do
        if reason=$(python3 -c "import misa, pytest, $module" 2>&1); then
          record "python/tests/test_$module.py" \
            python3 -m pytest -q -rs "python/tests/test_$module.py"
        else
          echo "python/tests/test_$module.py was left out: ${reason##*$'\n'}"
        fi
      done
      ;;
    bench)
      run "select" misa_bench_gpu
      for heads in 64 32; do
        run "steps, $heads heads" misa_bench_step --stages --heads "$heads" --keys 65536 131072 \
          --indexers dsa misa misa-dagger misa-r hisa
      done
      # The chip clocks lower after dense steps, so sparse steps are measured again without them.
      run "re-ranked and filtered" misa_bench_step --stages --keys 65536 131072 \
        --indexers misa-r:h=3:m=4096 misa-dagger hisa
      for heads in 64 32; do
        run "what routing costs, $heads heads" misa_bench_step --heads "$heads" \
          --keys 32768 65536 131072 --indexers misa misa-r misa:router=static
      done
      run "short contexts" misa_bench_step --keys 2048 4096 8192 16384 32768 65536 \
        --indexers dsa misa auto
      run "decode" misa_bench_decode --stages --batch 1 64 --context 8192 131072 \
        --indexers dsa misa misa-r:h=3:m=4k misa-r:h=3:m=4k:sketch=2 hisa
      run "decode, 4 queries a sequence" misa_bench_decode --batch 64 --context 131072 --next-n 4 \
        --indexers dsa misa hisa
      if reason=$(python3 -c 'import deep_gemm, torch' 2>&1); then
        record "peers" python3 bench/gpu/peers.py --heads 64 32 --keys 65536 131072
        record "peers of decode" python3 bench/gpu/peers.py --decode --batch 1 16 64 \
          --context 131072 --misa "$(find "$folder" -type f -name misa_bench_decode | head -n 1)"
      else
        echo "the peers were left out: ${reason##*$'\n'}"
      fi
      ;;
    report)
      kept gpu-floors misa_micro_gpu
      kept gpu-select misa_bench_gpu --json
      for heads in 64 32; do
        kept "gpu-steps-$heads" misa_bench_step --json --stages --heads "$heads" \
          --keys 65536 131072 --indexers dsa misa misa-dagger misa-r hisa
        # The chip clocks lower after dense steps, so sparse steps are measured again without them.
        kept "gpu-sparse-$heads" misa_bench_step --json --stages --heads "$heads" \
          --keys 65536 131072 --indexers misa misa-r misa-r:h=3:m=2k misa-dagger hisa
      done
      kept gpu-short misa_bench_step --json --keys 2048 4096 8192 16384 32768 65536 \
        --indexers dsa misa auto
      kept gpu-long misa_bench_step --json --keys 262144 524288 1048576 \
        --indexers misa misa-r:h=3:m=2k misa-dagger
      kept gpu-queries misa_bench_step --json --queries 1 64 256 700 1088 1500 \
        --keys 4096 65536 131072 --indexers misa
      kept gpu-decode-next-4 misa_bench_decode --json --batch 64 --context 131072 --next-n 4 \
        --indexers dsa misa
      kept gpu-decode-1m misa_bench_decode --json --batch 1 --context 1048576 \
        --indexers dsa misa misa-r:h=3:m=4k:sketch=2
      if reason=$(python3 -c 'import deep_gemm, torch' 2>&1); then
        decode=$(find "$folder" -type f -name misa_bench_decode | head -n 1)
        kept gpu-peers peers.py --json --heads 64 32 --keys 65536 131072
        # Pages have room for a sketch of 4 bits.
        kept gpu-decode-peers peers.py --json --decode --batch 1 4 16 64 --context 131072 \
          --page-stride 13440 --misa "$decode" --indexers dsa misa misa-dagger hisa misa-r \
          misa-r:h=3:m=2k misa-r:h=3:m=4k:sketch=2 misa-r:h=3:m=8k:sketch=2 dsa:m=2k:sketch=4
        kept gpu-decode-peers-short peers.py --json --decode --batch 64 256 --context 8192 \
          --misa "$decode" --indexers dsa misa
        kept gpu-decode-peers-32 peers.py --json --decode --heads 32 --batch 1 \
          --context 4096 8192 16384 32768 65536 --misa "$decode" --indexers dsa misa
        kept gpu-decode-peers-32-batch peers.py --json --decode --heads 32 --batch 16 64 \
          --context 131072 --misa "$decode" --indexers dsa misa
      else
        echo "the peers were left out: ${reason##*$'\n'}"
      fi
      if [ "$(nvidia-smi --list-gpus | wc -l)" -gt 1 ]; then
        kept gpu-context-parallel context_parallel.py --json
        kept gpu-context-parallel-layouts context_parallel.py --json --tokens 2048 \
          --keys 1048576 --layouts uneven 'stripes of 64' 'stripes of 1'
      fi
      ;;
    *)
      echo "gpu.sh: expected test, sanitize, python, bench or report, got '$stage'" >&2
      exit 2
      ;;
  esac
done

printf '\n'
cat "$scratch/summary"
! grep -q FAILED "$scratch/summary"
