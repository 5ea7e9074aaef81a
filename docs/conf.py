# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes the documentation; scripts/docs.sh runs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "python"))

project = "MISA"
author = "the MISA authors"
copyright = "the MISA authors, Apache 2.0"
version = release = re.search(r"misa VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]

extensions = ["breathe", "myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"MISA {version}"
highlight_language = "text"
default_role = "code"
nitpicky = True
nitpick_ignore_regex = [
    ("c:identifier", r"(size|u?int\d+)_t"),  # of the C library
    ("cpp:identifier", "State"),  # declared, and defined behind the interface
]
suppress_warnings = ["duplicate_declaration.cpp"]  # of the namespace, in every header
myst_heading_anchors = 4

breathe_projects = {"misa": str(ROOT / "build/docs/xml")}
breathe_default_project = "misa"
breathe_domain_by_extension = {"h": "c", "hpp": "cpp"}

# Docstrings are read without the compiled module, PyTorch and what else is imported, so that the
# pages are the same wherever they are made.
autodoc_mock_imports = ["misa._core", "safetensors", "torch", "transformers"]
autodoc_typehints = "none"  # docstrings have shapes and dtypes
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"

# An entry of a docstring's list of arguments or fields: "ks, ke: [T] int32; ...", with lines that
# belong to it indented.
ENTRY = re.compile(r"(\w+(?:, \w+)*): (.+)")


def set_out_arguments(_app, _what, _name, _obj, _options, lines: list[str]) -> None:
    """Makes a definition list of such entries."""
    before, inside = "", False
    for i, line in enumerate(lines):
        entry = ENTRY.fullmatch(line) if inside or not before else None
        inside = entry is not None or (inside and line.startswith(" "))
        before = line
        if entry:
            lines[i] = f"``{entry[1]}``\n    {entry[2]}"
    lines[:] = "\n".join(lines).split("\n")


def skip_tuple_fields(_app, _what, _name, obj, skip: bool, _options) -> bool:
    """Whether to leave out a member: fields of a NamedTuple stand in its docstring."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", set_out_arguments)
    app.connect("autodoc-skip-member", skip_tuple_fields)
