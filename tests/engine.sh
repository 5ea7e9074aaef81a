#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves small random models with vLLM or SGLang, whichever the environment has, on a machine with
# one Hopper GPU, the indexer replaced by MISA's, and judges what was selected: prefill and decode,
# with and without CUDA graphs.
#   tests/engine.sh [MODE...]          in the environment of $PYTHON (python3), which has misa and one
#                                      of the engines of tests/engine/*.txt; default: all modes
#   tests/engine.sh setup ENGINE       makes such an environment with Python 3.12: of vllm-0.26.0 and
#                                      the like, with the PyTorch that it pins, in $ENGINE_OUT/ENGINE
#   tests/engine.sh pack ENGINE OUT    packs what a machine without a network lacks: see
#                                      tests/engine/pack.sh
#   tests/engine.sh unpack FOLDER...   there: unpacks the pieces, and misa's wheel, that lie under
#                                      the folders into $ENGINE_SITE, which is then used
# ENGINE_OUT: for models, logs and caches, and served.json, which scripts/record.py can keep:
#   scripts/record.py served-vllm-0.33.0 --as tests/engine.sh cat build/engine/served.json
# ENGINE_JOBS: modes that share the GPU. ENGINE_LIMIT: seconds for a mode.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${ENGINE_OUT:-$here/../build/engine}
mkdir -p "$out" && out=$(realpath "$out")
. "$here/engine/environment.sh"

case "${1:-}" in
  setup)
    "$python" -m venv "$out/$2" && "$out/$2/bin/python" -m pip install "${2/-/==}" "$here/.." &&
      echo "now: PYTHON=$out/$2/bin/python tests/engine.sh"
    exit
    ;;
  pack)
    exec "$here/engine/pack.sh" "$2" "$3"
    ;;
  unpack)
    shift
    mkdir -p "$site"
    pieces=$(find "$@" -name '*.tar.xz.[0-9]' -printf '%f %p\n' | sort | cut -d ' ' -f 2-)
    [ -z "$pieces" ] || cat $pieces | "$python" -c '
import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as packed:
    packed.extractall(sys.argv[1], filter="tar")' "$site" || exit 1
    find "$@" -name '*.whl' | while read -r wheel; do
      "$python" -m zipfile -e "$wheel" "$site" || exit 1
    done
    # Engines that start together would each compile the same files.
    "$python" -m compileall -q -j 0 "$site" >/dev/null
    exit 0
    ;;
esac

engine=$("$python" -c '
from importlib.metadata import version
from importlib.util import find_spec

import misa, torch

engine = "vllm" if find_spec("vllm") else "sglang"
print(f"{engine} {version(engine)}, torch {torch.__version__}, misa {misa.__version__}, "
      f"{misa.backends()[0]}, {torch.cuda.get_device_name()}")' 2>"$out/versions.log") ||
  { cat "$out/versions.log"; exit 2; }
echo "$engine"
case $engine in
  vllm*) server=serve ;;
  *) server=serve_sglang ;;
esac

modes=("$@")
[ ${#modes[@]} -gt 0 ] ||
  mapfile -t modes < <(cd "$here/engine" &&
    "$python" -c "import $server; print(*$server.MODES, sep='\n')")

serve() {
  rm -f "$out/$1.json"
  timeout "${ENGINE_LIMIT:-300}" "$python" "$here/engine/$server.py" "$1" "$out" >"$out/$1.log" 2>&1
  local status=$?
  grep -E '^-- ' "$out/$1.log"
  [ -f "$out/$1.json" ] || {
    echo "-- $1: FAILED with status $status"
    grep -vE 'nanobind|leaked' "$out/$1.log" | tail -n 20
  }
}

for mode in "${modes[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "${ENGINE_JOBS:-4}" ]; do
    wait -n
  done
  serve "$mode" &
done
wait
"$python" "$here/engine/table.py" "$out" "$engine" "${modes[@]}"
