#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures again what bench/results/cpu-short.json holds, steps of a short context, and prints
which of their ratios have moved. Ratios, since machines differ; it fails for none of them.

  scripts/moved.py PROGRAM    the misa program
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

LAST = Path(__file__).parents[1] / "bench" / "results" / "cpu-short.json"
NOISE = 0.1
BUSY = 0.05  # the share of time waited for a processor from which misa bench warns


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """How many times DSA's time a step takes, by the fastest runs, which others disturb least."""
    indexers = results["contexts"][0]["indexers"]
    steps = {each["name"]: each["seconds_step"]["fastest"] for each in indexers}
    dense = steps.pop("dsa")
    return {name: step / dense for name, step in steps.items()}


def busy(results: dict[str, Any]) -> bool:
    return (results["contexts"][0]["waited_for_processor"] or 0) >= BUSY


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    last = json.loads(LAST.read_text())
    command = [sys.argv[1], *shlex.split(last["command"])[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout)
    then, now = ratios(last["results"]), ratios(measured)
    quiet = not busy(measured) and not busy(last["results"])
    print(f"times DSA's time; the last results are of {last['date'][:10]}, commit "
          f"{last['commit'][:7]}, on {last['machine']['processor']}")  # fmt: skip
    if not quiet:
        print("this machine is busy, or was then: what moved may be noise")
    print(f"{'indexer':22} {'last':>7} {'now':>7} {'moved':>8}")
    for name, ratio in now.items():
        if name not in then:
            print(f"{name:22} {'':7} {ratio:7.3f}")
            continue
        moved = ratio / then[name] - 1
        said = "  <- more than noise" if quiet and abs(moved) > NOISE else ""
        print(f"{name:22} {then[name]:7.3f} {ratio:7.3f} {100 * moved:+7.1f}%{said}")


if __name__ == "__main__":
    main()
