#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures indexers in vLLM on a machine with one Hopper GPU, prints a table and writes
# bench/results/engine.json. The engines start together, hold up to 25 GiB of the GPU each, and
# measure one after the other.
#   bench/engine.sh [VARIANT...]      those of bench/engine/measure.py
# What each kernel took is in ENGINE_OUT/bench-VARIANT.log. The environment, ENGINE_OUT and
# ENGINE_SITE are those of tests/engine.sh; BENCH_OPTIONS are those of bench/engine/measure.py.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${ENGINE_OUT:-$here/../build/engine}
mkdir -p "$out" && out=$(realpath "$out")
. "$here/../tests/engine/environment.sh"

variants=("$@")
[ ${#variants[@]} -gt 0 ] || variants=(engine dsa misa-r-m hisa)
measure() {
  rm -f "$out/bench-$1.json"
  timeout "${ENGINE_LIMIT:-300}" "$python" "$here/engine/measure.py" "$1" "$out" ${BENCH_OPTIONS:-} \
    >"$out/bench-$1.log" 2>&1 || grep -vE 'nanobind|leaked' "$out/bench-$1.log" | tail -n 15
}
"$python" "$here/../tests/engine/checkpoint.py" "$out/models/rank-2" v32 --context 262144 --rank
for variant in "${variants[@]}"; do
  measure "$variant" &
done
wait
"$python" - "$out" "${variants[@]}" <<'PY'
import json, pathlib, sys

folder, *variants = sys.argv[1:]
rows = []
for variant in variants:
    path = pathlib.Path(folder) / f"bench-{variant}.json"
    if path.exists():
        found = json.loads(path.read_text())
        first = [f"{value:.0f}" for value in found["first"].values()]
        later = [
            f"{v['token_ms']:.2f} ({v['device_ms']:.2f}; {v['indexer_us']:.0f})"
            for v in found["next"].values()
        ]
        rows.append((variant, first, later, found))
if rows:
    lengths, batches = (list(rows[0][3][key]) for key in ("first", "next"))
    print("| indexer |", " | ".join(f"first token of {n}, ms" for n in lengths), "|",
          " | ".join(f"token at B = {b}, ms (on the device; the indexer, us a layer)" for b in batches), "|")
    for variant, first, later, _ in rows:
        print(f"| {variant} |", " | ".join(first + later), "|")
PY
"$python" "$here/../scripts/record.py" engine --as "bench/engine.sh ${variants[*]}" \
  "$python" - "$out" "${variants[@]}" <<'PY'
import importlib.metadata, json, pathlib, sys

folder, *variants = sys.argv[1:]
paths = {variant: pathlib.Path(folder) / f"bench-{variant}.json" for variant in variants}
found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
print(json.dumps({"vllm": importlib.metadata.version("vllm"), "variants": found}))
PY
