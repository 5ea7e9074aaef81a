#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a program that prints JSON, and keeps what it printed with where and when it ran.

  scripts/record.py NAME [--as TEXT] COMMAND [ARGUMENT...]    writes bench/results/NAME.json

TEXT is what is kept as the command, by default the command itself without this machine's folders.

bench/results/README.md says what such a file holds. MISA_RESULTS names another folder,
MISA_COMMIT the commit where git does not know it. If the command fails, nothing is written.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What is measured.
SOURCES = (
    "CMakeLists.txt",
    "bench",
    "cli",
    "cmake",
    "data",
    "include",
    "python",
    "src",
    ":!bench/results",
)


def output_of(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def commit() -> str:
    """The commit that is checked out, with a + if sources differ from it."""
    head = os.environ.get("MISA_COMMIT") or output_of("git", "rev-parse", "HEAD").strip()
    if not head:
        sys.exit("record.py: git names no commit: expected it in MISA_COMMIT")
    return head + "+" * bool(output_of("git", "status", "--porcelain", "-uno", "--", *SOURCES))


def machine() -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE)
    found["processor"] = model[1] if model else os.uname().machine
    found["threads"] = len(os.sched_getaffinity(0))
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    devices = Counter(tuple(row) for row in csv.reader(output_of(*query).splitlines()))
    for (name, driver), count in devices.items():
        found["devices"] = f"{count} x {name.strip()}"
        found["driver"] = driver.strip()
    return found


def shown(argument: str) -> str:
    """An argument without the folders of this machine."""
    path = Path(argument)
    if not path.is_absolute() and not path.parts[:1] == ("build",):
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT / "data") else path.name


def without_host(results: Any) -> Any:
    """What was printed, less the name of the host, which Google Benchmark prints too."""
    if isinstance(results, dict) and isinstance(results.get("context"), dict):
        results["context"].pop("host_name", None)
    return results


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    name, *command = sys.argv[1:]
    text = ""
    if command[0] == "--as":
        _, text, *command = command
    folder = Path(os.environ.get("MISA_RESULTS", ROOT / "bench" / "results"))
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"record.py: {name} was not written: {error}")
    record = {
        "commit": commit(),
        "date": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "command": text or shlex.join(map(shown, command)),
        "results": without_host(json.loads(done.stdout, parse_constant=lambda _: None)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"record.py: {name}", file=sys.stderr)


if __name__ == "__main__":
    main()
