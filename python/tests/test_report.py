# SPDX-License-Identifier: Apache-2.0
"""Tables and plots are those of bench/results, and what was typed instead is a fault."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("report")
    for name in [name for name in sys.modules if name.partition("_")[0] == "report"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_an_edited_table_is_a_fault(report, name) -> None:
    text = (ROOT / name).read_text()
    assert report.faults_of_page(name, text) == []
    row = next(row for row in text.splitlines() if row.startswith("| MISA"))
    digit = next(character for character in reversed(row) if character.isdigit())
    edited = text.replace(row, row[::-1].replace(digit, str((int(digit) + 1) % 10), 1)[::-1])
    [fault] = report.faults_of_page(name, edited)
    assert "--write" in fault
    assert report.rendered(edited) == text


@pytest.mark.parametrize(
    "figure", ["355 µs", "1.2 ×", "98.3 %", "4.2 TB/s", "12ms", "2,155 TFLOP/s"]
)
def test_a_figure_without_a_source_is_a_fault(report, figure) -> None:
    [fault] = report.faults_of_page("page", f"A step takes {figure} here.")
    assert figure in fault


def test_a_table_without_a_source_is_a_fault(report) -> None:
    [fault] = report.faults_of_page(
        "page", "Some text:\n\n| indexer | 128K |\n|---|---|\n| DSA | 355 |\n"
    )
    assert "indexer" in fault


@pytest.mark.parametrize("name", ["64 × 128 keys", "`--fp8 10 %`", "B = 64", "2048 of a million"])
def test_a_name_is_no_figure(report, name) -> None:
    assert report.faults_of_page("page", f"With {name} it is another.") == []


def test_an_unknown_table_is_named(report) -> None:
    with pytest.raises(SystemExit, match="no table misread"):
        report.rendered("<!-- results: misread -->\n<!-- end -->")


def test_a_note_is_shown(report) -> None:
    notes = [json.loads(path.read_text()).get("note", "") for path in report.RESULTS.glob("*.json")]
    assert any(notes)
    shown = report.report_tables.block("sources")
    assert [note for note in notes if note not in shown] == []


@pytest.mark.parametrize(
    "table, rows",
    [("selector", "|"), ("decode", "| DeepGEMM"), ("cpu-peers", "|"), ("floors", "| CPU")],
)
def test_a_spread_is_shown(report, table, rows) -> None:
    lines = report.report_tables.block(table).splitlines()[2:]
    found = [line for line in lines if line.startswith(rows)]
    assert found and all("±" in line for line in found)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"commit": "HEAD"}, "commit"),
        ({"date": "today"}, "date"),
        ({"machine": "H200"}, "machine"),
        ({"results": None}, "results"),
        ({"spread": 1}, "spread"),
    ],
)
def test_a_result_has_a_source(report, monkeypatch, tmp_path, change, fault) -> None:
    record = json.loads((ROOT / "bench/results/recall.json").read_text())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert report.faults_of_results() == []
    (tmp_path / "one.json").write_text(json.dumps({**record, **change}))
    [found] = report.faults_of_results()
    assert found.startswith(f"one.json: {fault}") or f"expected {fault}" in found


def test_what_is_recorded(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    record = importlib.import_module("record")
    monkeypatch.setenv("MISA_RESULTS", str(tmp_path))
    program = 'print(\'{"context": {"host_name": "a"}, "us": 1.5, "gflops": NaN}\')'
    monkeypatch.setattr(sys, "argv", ["record.py", "one", sys.executable, "-c", program])
    monkeypatch.setenv("MISA_COMMIT", "0" * 40)
    record.main()
    found = json.loads((tmp_path / "one.json").read_text())
    assert found["results"] == {"context": {}, "us": 1.5, "gflops": None}
    assert found["commit"].startswith("0" * 40) and found["machine"]["threads"] > 0
    assert "/" not in found["command"].split()[0]
    monkeypatch.setattr(
        sys, "argv", ["record.py", "two", sys.executable, "-c", "raise SystemExit(1)"]
    )
    with pytest.raises(SystemExit, match="two was not written"):
        record.main()
    assert not (tmp_path / "two.json").exists()
