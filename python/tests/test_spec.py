# SPDX-License-Identifier: Apache-2.0
"""docs/spec.md: every numbered rule names the tests that hold it, and each of those exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _tests() -> set[str]:
    """The names of all tests, "Suite.Name" or a function's."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.cpp"):
        named = re.findall(r"^TEST(?:_P|_F)?\(\s*(\w+),\s*(\w+)\)", path.read_text(), re.MULTILINE)
        found |= {f"{suite}.{name}" for suite, name in named}
    for path in (ROOT / "python/tests").rglob("test_*.py"):
        found |= set(re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE))
    return found


def test_every_rule_is_held() -> None:
    spec = (ROOT / "docs/spec.md").read_text()
    rules = spec.split("## Rules that hold for all of them")[1].split("\n## ")[0]
    numbers = re.findall(r"^(\d+)\. ", rules, re.MULTILINE)
    assert numbers == [str(i + 1) for i in range(len(numbers))] and numbers
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", rules, re.MULTILINE))
    assert list(rows) == numbers
    known = _tests()
    for number, names in rows.items():
        named = re.findall(r"`([\w.]+)`", names)
        assert named, f"rule {number} names no test"
        for name in named:
            assert name in known, f"rule {number} names {name}, which is no test"
