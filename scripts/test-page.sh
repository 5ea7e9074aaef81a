#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests the page of `misa compare --html` in a headless browser, with the program of build/release.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/venv.sh
build/venv/bin/python -m pip install -q --disable-pip-version-check --group page
build/venv/bin/python -m pytest -q tests/cli/page_test.py
