# SPDX-License-Identifier: Apache-2.0
# For tests/engine.sh and bench/engine.sh: where the engine is, and where it keeps what it compiles.
# $out: their folder.
site=${ENGINE_SITE:-$out/site}
python=${PYTHON:-python3}
# The last is what the .pth file of nvidia-cutlass-dsl adds, which is read in site-packages only.
for folder in "$site" "$site/nvidia_cutlass_dsl/dsl_packages"; do
  [ ! -d "$folder" ] || export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH}
done
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export VLLM_CACHE_ROOT=$out/cache DG_JIT_CACHE_DIR=$out/cache/dg TRITON_CACHE_DIR=$out/cache/triton
export SGLANG_DG_CACHE_DIR=$out/cache/dg TVM_FFI_CACHE_DIR=$out/cache/tvm-ffi
export FLASHINFER_WORKSPACE_BASE=$out/cache
# DeepGEMM and SGLang's kernels are compiled with nvcc when they run.
if [ -z "${CUDA_HOME:-}" ] && nvcc=$(command -v nvcc); then
  CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  export CUDA_HOME
fi
