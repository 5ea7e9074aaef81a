#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates an environment from a dependency group of pyproject.toml.
#   scripts/venv.sh         build/venv, where the package is built, tested and checked
#   scripts/venv.sh docs    build/venv-docs, where the documentation is made
set -euo pipefail
cd "$(dirname "$0")/.."
group=${1:-check}
case "$group" in
  check) venv=build/venv options=(--system-site-packages) packages=(scikit-build-core nanobind) ;;
  docs) venv=build/venv-docs options=() packages=() ;;
  *) echo "venv.sh: expected check or docs, got '$group'" >&2; exit 2 ;;
esac
[ -x $venv/bin/python ] || /usr/bin/python3 -m venv "${options[@]}" $venv
if [ ! $venv/made -nt pyproject.toml ]; then
  pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
  "${pip[@]}" 'pip>=25.1'  # the first with dependency groups
  "${pip[@]}" --group "$group" "${packages[@]}"
  touch $venv/made
fi
