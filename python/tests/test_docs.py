# SPDX-License-Identifier: Apache-2.0
"""The pages of the reference name everything that is public."""

import re
from pathlib import Path

import misa

ROOT = Path(__file__).parents[2]
PYTHON = (ROOT / "docs/reference/python.md").read_text()


def directives(name: str, page: str) -> set[str]:
    return set(re.findall(rf"^\.\. {name}:: (\S+)$", page, re.MULTILINE))


def test_python_calls() -> None:
    calls = directives("autofunction", PYTHON) | directives("autoclass", PYTHON)
    assert calls == set(misa.__all__) - {"__version__"}


def test_python_modules() -> None:
    folder = ROOT / "python"
    files = (path.relative_to(folder).with_suffix("") for path in folder.glob("misa/**/*.py"))
    public = {".".join(file.parts) for file in files if not file.name.startswith("_")}
    assert directives("automodule", PYTHON) == public


def test_headers() -> None:
    pages = "".join((ROOT / f"docs/reference/{name}.md").read_text() for name in ("cpp", "c"))
    headers = {path.name for path in (ROOT / "include/misa").iterdir()}
    assert set(re.findall(r"\{doxygenfile\} (\S+)", pages)) == headers - {"misa.hpp"}
