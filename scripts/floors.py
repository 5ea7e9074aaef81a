#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the code against the table of floors in CONTRIBUTING.md, and its grid of stages.

A file includes only from its own folder and the folders that its row of the table names, and a row
names lower floors only. So no folder includes a higher one, no stage another stage, and no folders
form a cycle. Every folder that a row names is included somewhere.

  scripts/floors.py            checks; prints what is wrong and exits with 1
  scripts/floors.py --write    writes the grid of stages and backends into CONTRIBUTING.md
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
STAGES = ("cache", "pool", "filter", "route", "score", "select", "rerank")
# The names of a stage's compiled files for each backend.
BACKENDS = {
    "reference": r"reference\.cpp",
    "CPU": r"(cpu|cache)\.cpp|cpu-inl\.h",
    "CUDA, 8.0 and above": r"(?!sm90_)\w+\.cu",
    "CUDA, Hopper": r"sm90_\w+\.cu",
}
MAX_LINES = 550  # what a reader can hold at once
MARKS = ("<!-- grid: scripts/floors.py --write -->\n", "<!-- end of grid -->\n")


def table() -> dict[str, tuple[int, set[str]]]:
    """The floor of each folder, and the folders that it may include."""
    rows = re.findall(r"^\| `([\w/]+)/` \| (\d+) \| ([^|]*)\|", PAGE.read_text(), re.MULTILINE)
    return {name: (int(floor), set(re.findall(r"`(\w+)/`", may))) for name, floor, may in rows}


def sources() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "src", "cli", "python/src"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [each for each in listed.stdout.split() if re.search(r"\.(cpp|hpp|h|cu|cuh)$", each)]


def lengths() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "src", "cli", "python/misa", "python/src"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    counts = {name: len((ROOT / name).read_bytes().splitlines()) for name in listed.stdout.split()}
    return [
        f"{name}: expected at most {MAX_LINES} lines, got {count}"
        for name, count in counts.items()
        if count > MAX_LINES
    ]


def folder_of(source: str) -> str:
    parts = source.split("/")
    return parts[1] if parts[0] == "src" else "/".join(parts[:-1]) if parts[0] != "cli" else "cli"


def check() -> list[str]:
    floors = table()
    faults = []
    for name, (floor, may) in floors.items():
        for other in may:
            if other not in floors:
                faults.append(f"CONTRIBUTING.md: {name}/ may include {other}/, which has no row")
            elif floors[other][0] >= floor:
                faults.append(f"CONTRIBUTING.md: {name}/ of floor {floor} may include {other}/")
    seen = defaultdict(set)
    any_floor = set(re.findall(r"`(cli/\w+\.cpp)`", PAGE.read_text()))
    for source in sources():
        folder = folder_of(source)
        for include in re.findall(r'^#include "([\w./-]+)"', (ROOT / source).read_text(), re.M):
            other = include.split("/")[0]
            if not (ROOT / "src" / include).exists() or other == folder:
                continue  # of the public interface, another project or its own folder
            if source not in any_floor:
                seen[folder].add(other)
            if folder not in floors:
                faults.append(f"{source}: its folder {folder}/ has no row in CONTRIBUTING.md")
            elif other not in floors[folder][1] and source not in any_floor:
                faults.append(f"{source}: {folder}/ may not include {include}")
    for name, (_, may) in floors.items():
        for other in sorted(may - seen[name]):
            faults.append(f"CONTRIBUTING.md: {name}/ may include {other}/, but does not")
    return faults


def grid() -> str:
    lines = ["| stage | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for stage in STAGES:
        files = sorted(each.name for each in (ROOT / "src" / stage).iterdir())
        cells = []
        for pattern in BACKENDS.values():
            cells.append(" ".join(f"`{name}`" for name in files if re.fullmatch(pattern, name)))
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    before, rest = PAGE.read_text().split(MARKS[0])
    written, after = rest.split(MARKS[1])
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(before + MARKS[0] + grid() + MARKS[1] + after)
        return 0
    faults = check() + lengths()
    if written != grid():
        faults.append("CONTRIBUTING.md: the grid does not match the tree: floors.py --write")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
