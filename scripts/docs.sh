#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes build/docs/html: Doxygen reads the headers, Sphinx the docstrings and the pages of docs/. A
# warning of either is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/venv.sh docs
rm -rf build/docs
mkdir -p build/docs
doxygen docs/Doxyfile
build/venv-docs/bin/sphinx-build -q -W --keep-going -j auto -d build/docs/doctrees docs build/docs/html
