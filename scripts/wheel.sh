#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds a wheel that holds all the libraries it needs, in build/wheel, and checks it in an empty
# environment of another distribution. The CUDA backends are inside where there is nvcc.
#   scripts/wheel.sh [ARCHITECTURES]    of CUDA, as CMake takes them, e.g. 90-real; cmake/cuda.cmake
#                                       has the default
# The stable ABI needs Python 3.12, and Debian 12 has 3.11: the Python of an unpacked Debian 13 builds
# it, with Debian 12's compiler and C library, so that the wheel runs on either. Needs to be root, to
# enter Debian 13. What `make cuda` or `make test` compiled is reused.
set -euo pipefail
cd "$(dirname "$0")/.."
architectures=${1:-}
if [ "$(id -u)" -ne 0 ]; then
  echo "wheel.sh: expected to be run by root, got user $(id -un)" >&2
  exit 2
fi
scripts/venv.sh
export PATH=$PWD/build/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
wheels=$PWD/build/wheel
debian=$wheels/debian13
mkdir -p "$wheels"
if [ ! -e "$debian" ]; then
  rm -rf "$debian.new"
  mmdebstrap --quiet --variant=apt --include=python3-dev,python3-venv trixie "$debian.new"
  mv "$debian.new" "$debian"
fi

# Its Python, run outside with its own C library and with the packages of build/venv, which are not
# compiled. One of its headers includes another by a path that Debian 12's folders do not have.
usr=$debian/usr
version=$(basename "$(readlink "$usr/bin/python3")")
python=$usr/bin/python-outside
if [ ! "$python" -nt pyproject.toml ]; then
  pip install --quiet --group wheel
  machine=$(g++ -print-multiarch)
  cp "$usr/include/$machine/$version/pyconfig.h" "$usr/include/$version/pyconfig.h"
  cat >"$python" <<END
#!/bin/sh
export PYTHONPATH=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
exec $debian$(patchelf --print-interpreter "$usr/bin/$version") --argv0 "\$0" \\
  --library-path $usr/lib/$machine $usr/bin/$version "\$@"
END
  chmod +x "$python"
fi

preset=release
if [ -n "$architectures" ] || command -v nvcc >/dev/null; then
  preset=cuda
fi
build=build/$preset${architectures:+-${architectures//;/-}}
cmake --preset $preset -B "$build" ${architectures:+"-DCMAKE_CUDA_ARCHITECTURES=$architectures"} |
  grep '^-- MISA for'
rm -rf "$wheels"/*.whl "$wheels/raw"
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$wheels/raw" \
  --config-settings build-dir="$build" --config-settings cmake.define.MISA_BUILD_TESTS=ON \
  --config-settings build.targets="misa_python_stub;misa_program" .
auditwheel repair --strip --wheel-dir "$wheels" "$wheels"/raw/*.whl
wheel=$(echo "$wheels"/*.whl)

# Nothing but the three libraries came along, the module's only symbol is what Python calls, and it
# uses nothing outside the stable ABI.
python -m zipfile -e "$wheel" "$wheels/raw/unpacked"
for library in "$wheels"/raw/unpacked/misa.libs/*; do
  case $(basename "$library") in
    libfmt-* | libhwy-* | libtbb-*) ;;
    *) echo "wheel.sh: did not expect $library in the wheel" >&2; exit 1 ;;
  esac
done
exported=$(nm -D --defined-only "$wheels"/raw/unpacked/misa/_core*.so | cut -d' ' -f3)
if [ "$exported" != PyInit__core ]; then
  printf 'wheel.sh: expected the module to export PyInit__core, got\n%s\n' "$exported" >&2
  exit 1
fi
abi3audit --strict "$wheel"

# Installed beside NumPy alone where there is nothing of this machine, it works.
box=$debian/tmp/box
rm -rf "$box"
mkdir "$box"
cp "$wheel" scripts/check-wheel.py "$box"
pip download --quiet --only-binary :all: --no-deps --python-version "${version#python}" \
  --dest "$box" numpy
env -i PATH=/usr/bin:/bin unshare --mount --pid --fork --root="$debian" --mount-proc /bin/sh -ec '
  cd /tmp/box
  python3 -m venv env
  env/bin/pip install --quiet --no-index --find-links . misa
  env/bin/python -I check-wheel.py
  env/bin/misa info'
echo "built and checked ${wheel#"$PWD/"} ($(du -h "$wheel" | cut -f1))"
