#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# For a machine that has a GPU, Python 3.12, torch 2.11 and transformers 5.17 but no network: packs
# what it lacks to serve a model.
#   tests/engine/pack.sh ENGINE-VERSION OUT        ENGINE-VERSION: vllm-0.26.0, …: a list beside this
# OUT gets piece1, piece2, … of at most 36 MiB, folders that hold one file each. There,
# `tests/engine.sh unpack OUT` puts them together.
#
# The engine's wheel loses what these tests do not run on Hopper, and GPU code of other
# architectures. WHEELS is a folder of wheels that need not be downloaded again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
engine=$1 out=$(realpath -m "$2") wheels=$(realpath -m "${WHEELS:-$2/wheels}")
name=${engine%%-*} version=${engine#*-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$wheels" "$work/site"

download() {
  local platforms=()
  for tag in manylinux_2_{39,38,36,35,34,31,28,27,26,24,17,12,5} manylinux2014 manylinux2010 \
    manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" -d "$wheels" "$@"
}

download "$name==$version" -r "$here/$engine.txt"

# Attention of other generations, servers, and kernels and headers that no test uses. `pruned` holds
# libraries with GPU code.
case $name in
  vllm)
    pruned=vllm
    left_out='vllm/vllm_flash_attn/_vllm_fa2* vllm/vllm-rs vllm/third_party/fmha_sm100
      vllm/_qutlass_C* vllm/_deepselect_C* vllm/_flashkda_C* vllm/benchmarks
      vllm/third_party/deep_gemm/_C.cpython-31[0134]* vllm/entrypoints/serve/instrumentator/static'
    ;;
  sglang)
    pruned=sgl_kernel
    left_out='sgl_kernel/flash_ops* sgl_kernel/sm100 sglang/multimodal_gen sglang/test
      sglang/srt/server/_core* sglang/srt/grpc/_core* sglang/benchmark flashinfer/data/cutlass/python'
    ;;
esac
unzip -q "$wheels/$name-$version"-*.whl -d "$work/site"
sed 's/[=<>].*//; /^#/d; s/-/_/g' "$here/$engine.txt" | while read -r package; do
  find "$wheels" -maxdepth 1 -iname "$package-*.whl" -exec unzip -q -o {} -d "$work/site" \;
done
# shellcheck disable=SC2086  # patterns
(cd "$work/site" && rm -rf $left_out)
find "$work/site/$pruned" -name '*.so' -exec python3 "$here/prune.py" 90 {} +
rm -rf "$work"/site/*.data "$work"/site/bin
find "$work/site" \( -name __pycache__ -o -name tests \) -type d -prune -exec rm -rf {} +

tar -C "$work/site" --owner=0 --group=0 --sort=name -cf "$work/site.tar" .
xz -T0 -6 "$work/site.tar"
size=$(stat -c %s "$work/site.tar.xz")
rm -rf "$out"/piece*
split -n $(((size + (36 << 20) - 1) / (36 << 20))) --numeric-suffixes=1 -a 1 "$work/site.tar.xz" "$work/part"
for part in "$work"/part*; do
  folder=$out/piece${part##*part}
  mkdir "$folder"
  mv "$part" "$folder/$engine.tar.xz.${part##*part}"
done
du -sh "$out"/piece*
