#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates build/venv, where the package is built, tested and checked, from pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=build/venv
[ -x $venv/bin/python ] || /usr/bin/python3 -m venv --system-site-packages $venv
if [ ! $venv/made -nt pyproject.toml ]; then
  pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
  "${pip[@]}" 'pip>=25.1'  # the first with dependency groups
  "${pip[@]}" scikit-build-core nanobind
  "${pip[@]}" --group check
  touch $venv/made
fi
