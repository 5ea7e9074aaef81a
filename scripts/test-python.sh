#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the package into build/venv and runs its tests. The module is built in build/release, so
# that the C++ library compiled there is reused.
#   scripts/test-python.sh [EXTRAS]    extras of pyproject.toml, by default `test`
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/venv.sh
cmake --preset release >/dev/null
python=build/venv/bin/python
"$python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps \
  --force-reinstall --config-settings build-dir=build/release \
  --config-settings cmake.define.MISA_BUILD_TESTS=ON .
"$python" -m pip install -q --disable-pip-version-check "misa[${1:-test}]"
"$python" -m pytest -q
