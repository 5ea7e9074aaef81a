#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the plugin in the engine of this environment, which needs misa, the engine and pytest.

    check-engine.py vllm | sglang

The engine loads the plugin and calls it with its own metadata; results are compared with
misa.select. No GPU is needed: kernels that need one are replaced by loops. Prints the versions that
passed.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent / "python" / "tests" / "integrations"


class Skips:
    """The tests that did not run."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.names.append(report.nodeid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=("vllm", "sglang"))
    engine = parser.parse_args().engine
    packages = ("misa", engine, "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    skips = Skips()
    options = ["-q", "--disable-warnings", "-p", "no:cacheprovider"]
    status = pytest.main([*options, str(TESTS / f"test_{engine}.py")], plugins=[skips])
    if status or skips.names:
        print(f"failed on {versions}; skipped: {len(skips.names)}")
        return 1
    print(f"passed on {versions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
