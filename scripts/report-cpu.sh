#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Writes the results of the CPU into bench/results; `make report` builds what it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
misa=build/bench/cli/misa
# Interleaved, so that what else the machine does slows a peer and ours alike.
bench=(build/bench/bench/misa_bench --benchmark_format=json
  --benchmark_enable_random_interleaving=true)
indexers=dsa,misa,misa-dagger,hisa,misa-r,misa-r:h=3:m=2k
trace=data/trace_h64_layer3.safetensors

scripts/record.py recall $misa compare $trace --top-k 2048 --runs 0 --json --indexers $indexers
scripts/record.py recall-fp8 $misa compare $trace --top-k 2048 --runs 0 --json --fp8 \
  --indexers misa-r:h=3:m=4k:sketch=2,misa-r:h=3:m=8k:sketch=2,dsa:m=2k:sketch=4
# A context of 128K has 64 keys for every one of a top 2048, as these traces have at 256.
for k in 2048 512 256; do
  scripts/record.py "recall-sketch-$k" $misa compare data/*.safetensors --top-k $k --runs 0 --json \
    --fp8 --indexers misa-r:h=3:m=4k:sketch=2,misa-r:h=3:m=8k:sketch=2,dsa:m=2k:sketch=4
done
scripts/record.py cpu-short $misa bench --json --queries 64 --keys 16K --dtype F8_E4M3 --runs 15
for dtype in BF16 F8_E4M3; do
  name=${dtype#F8_}
  scripts/record.py "cpu-steps-${name,,}" $misa bench --json --keys 64K --dtype $dtype \
    --indexers $indexers
done
if [ -x build/bench/bench/misa_micro_cpu ]; then  # of x86-64 alone
  scripts/record.py cpu-floors build/bench/bench/misa_micro_cpu
fi
scripts/record.py cpu-stages "${bench[@]}" '--benchmark_filter=peer|score|select'
scripts/record.py cpu-stages-1 taskset -c 0 "${bench[@]}" \
  '--benchmark_filter=peer/onednn|score/dense/bf16'
if python3 -c 'import torch' 2>/dev/null; then
  scripts/record.py cpu-peers python3 -P python/misa/_bench_peers.py --json --queries 256 \
    --misa $misa
else
  echo 'torch is not installed: the peers in Python were left out'
fi
