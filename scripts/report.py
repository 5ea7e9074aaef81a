#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Renders the tables and plots of README.md and other pages from bench/results/*.json.

  scripts/report.py            checks that they are what the results say; exits with 1 if not
  scripts/report.py --write    writes them

A table stands between <!-- results: NAME --> and <!-- end -->; NAME is a function of
report_tables.py. Outside of these README.md and docs/performance.md have no table and no measured
figure: a number with a unit of time, rate or ratio is a fault. Plots are those of report_plots.py,
in docs/plots.
"""

from __future__ import annotations

import datetime
import json
import re
import sys

import report_plots
import report_tables
from report_data import RESULTS, ROOT

PAGES = ("README.md", "docs/performance.md")
# These may have other tables too.
MIXED_PAGES = (
    "docs/integrations/vllm.md",
    "docs/integrations/sglang.md",
    "docs/kernels/step.md",
)
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
# What a figure looks like in prose: 355 µs, 1.2 ×, 98.3 %, 4.2 TB/s.
FIGURE = re.compile(
    r"\d[\d.,]*\s?(?:[µmun]?s|%|[MGT]B/s|[GT]FLOP/s|GHz)(?!\w)|\d[\d.,]*\s?×(?!\s?\d)"
)
KEYS = {"commit": str, "date": str, "machine": dict, "command": str, "results": (dict, list)}
OPTIONAL = {"transcribed": bool, "note": str}


def faults_of_results() -> list[str]:
    faults = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        for key, kind in KEYS.items():
            if not isinstance(record.get(key), kind):
                faults.append(f"{path.name}: expected {key}, got {record.get(key)!r}")
        for key in record.keys() - KEYS.keys():
            if key not in OPTIONAL or not isinstance(record[key], OPTIONAL[key]):
                faults.append(f"{path.name}: {key} is not in bench/results/README.md")
        if not re.fullmatch(r"[0-9a-f]{40}\+?", str(record.get("commit"))):
            faults.append(f"{path.name}: commit: expected 40 hexadecimal digits")
        try:
            datetime.datetime.fromisoformat(str(record.get("date")))
        except ValueError:
            faults.append(f"{path.name}: date: expected ISO 8601, got {record.get('date')!r}")
    return faults


def rendered(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{report_tables.block(match[2]).strip()}\n\n{match[4]}"

    return BLOCK.sub(block, text)


def faults_of_page(name: str, text: str) -> list[str]:
    faults = []
    if rendered(text) != text:
        faults.append(f"{name}: a table is not what the results say: scripts/report.py --write")
    if name in MIXED_PAGES:
        return faults
    prose = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", BLOCK.sub("", text), flags=re.DOTALL)
    if row := re.search(r"^\|.*", prose, re.MULTILINE):
        faults.append(f"{name}: a table without a source: {row[0][:60]}")
    for figure in FIGURE.finditer(prose):
        faults.append(f"{name}: {figure[0]!r} stands outside of the tables, without a source")
    return faults


def main() -> int:
    write = sys.argv[1:] == ["--write"]
    if sys.argv[1:] and not write:
        sys.exit(__doc__)
    faults = faults_of_results()
    if not faults:
        for name in (*PAGES, *MIXED_PAGES):
            path = ROOT / name
            if write:
                path.write_text(rendered(path.read_text()))
            faults += faults_of_page(name, path.read_text())
        for path, svg in report_plots.plots():
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(svg)
            elif not path.exists() or path.read_text() != svg:
                faults.append(
                    f"{path.name}: is not what the results say: scripts/report.py --write"
                )
    read = report_tables.read() | {"cpu-short"}  # which scripts/moved.py compares with
    for unread in sorted({path.stem for path in RESULTS.glob("*.json")} - read):
        faults.append(f"{unread}.json: no table reads it")
    for fault in faults:
        print(f"report.py: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
