# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs as printed, and is the example."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    """README and examples/select.py say the same, and it prints what it says."""
    pytest.importorskip("torch")
    example = ROOT / "examples" / "select.py"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [example.read_text().split('"""\n\n', 1)[1]] == blocks
    runpy.run_path(str(example))
    assert re.fullmatch(r"query 0 attends to positions \d+ \.\.\. \d+\n", capsys.readouterr().out)
