#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Finds old identifiers that the code has replaced by usual terms; prints them and exits with 1.

scripts/names.py [FILE...]    by default every tracked source and document
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A pattern of old identifiers, and the term that replaced them.
REPLACED = {
    "find_cut|find_bound|sample_bound|bound_rank|bound_below": "k-th entry, gate threshold",
    "kWarp": "kFullMask, or what the value means",
    "Held|RowSource": "candidates, entries",
    r"Digits<|Bracket|kBins|bracket_all": "radix histogram, buckets",
    r"\w*plateaus?\w*": "tied scores",
    "Sharers|sharers|kSharers": "query run",
    r"Misses|kMissed\w+|\w+_missed|missed_\w+": "fallback rows",
    r"listed_kernel|launch_listed|kListed\w+|ListedShared": "gathered",
    r"Deal\b|deal\.\w+|kMaxShare|takes_pieces": "key splits, work items",
    "takes_sm90|hopper": "sm90_can_implement, MatrixInstructions",
    "own_mean|load_own|store_own|own_place|own_factor": "partial block mean",
    r"judged_by_means|Judge::\w+": "block-mean products",
    r"weigh<|weigh\(": "weighted ReLU sum",
    r"struct Needs|Needs&|needs_": "workspace spec, recipe",
    "Bump|bump_": "arena",
    r"[Ss]labs?|kMaxSlab|kMaxWave|begin_wave|largest_wave": "query chunk",
    "work_of|mean_work": "cost_of, mean_cost",
}
PATTERN = re.compile(rf"(?<![\w.])(?:{'|'.join(REPLACED)})(?!\w)")


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "src", "include", "cli", "bench", "tests", "docs", "python", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [name for name in listed.stdout.split() if "fuzz/corpus" not in name]


def main() -> int:
    found = 0
    for name in sys.argv[1:] or tracked():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for match in PATTERN.finditer(line):
                term = next(new for old, new in REPLACED.items() if re.fullmatch(old, match[0]))
                print(f"{name}:{number}: {match[0]}: the term is {term}")
                found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
