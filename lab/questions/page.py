# SPDX-License-Identifier: Apache-2.0
"""The page of answers, every figure of it from the JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .answers import ATTENTION, RECALL

ABOUT = f"""\
# Questions to trained indexers

Made by `python -m lab.questions`. Figures are of the traces below alone: those of small models are
leads to follow, not results for DeepSeek-V3.2 or GLM-5. The same command answers for captures of
such a model.

Each figure is the mean over blocks of up to eight neighbouring rows, with a 95 % interval by
bootstrap over these blocks: it speaks for other rows of the same layer and text, not for other
texts or models. An interval from few blocks is too narrow. ▲ and ▼ mark series whose difference
from the one that is named, row by row, has an interval above or below zero. *{RECALL}* is the
share of DSA's k positions that are selected. *{ATTENTION.capitalize()}* is the layer's dense
attention at the selected positions beside that at DSA's, of the last rows, whose attention traces
have.
"""


def per_cent(value: float) -> str:
    return f"{100 * value:.1f}"


def mark(point: list[Any]) -> str:
    if len(point) < 7:
        return ""
    return " ▲" if point[5] > 0 else " ▼" if point[6] < 0 else ""


def cell(point: list[Any] | None) -> str:
    if point is None:
        return ""
    return f"{per_cent(point[1])} ({per_cent(point[2])} to {per_cent(point[3])}){mark(point)}"


def points_at(answer: dict[str, Any], measure: str) -> dict[str, list[list[Any] | None]]:
    """By series the point of each trace at the question's x, None where it has none."""
    by_trace = answer["measures"][measure]
    found = {}
    for name in dict.fromkeys(name for one in by_trace.values() for name in one):
        points = [
            next((p for p in one.get(name, []) if p[0] == answer["at"]), None)
            for one in by_trace.values()
        ]
        if any(points):
            found[name] = points
    return found


def table(answer: dict[str, Any], measure: str) -> list[str]:
    traces = answer["measures"][measure]
    lines = [f"| {measure}, % | " + " | ".join(traces) + " |", "|---" * (1 + len(traces)) + "|"]
    for name, points in points_at(answer, measure).items():
        lines.append(f"| {name} | " + " | ".join(map(cell, points)) + " |")
    return lines


def order(answer: dict[str, Any], measure: str) -> str:
    """A line: the series from most to least by their means over traces, with a mark where all
    traces agree on it."""
    means = {}
    for name, points in points_at(answer, measure).items():
        known = [point for point in points if point is not None]
        marks = {mark(point) for point in known}
        agreed = marks.pop() if len(marks) == 1 else ""
        means[f"{name} {{}}{agreed}"] = sum(point[1] for point in known) / len(known)
    ranked = sorted(means.items(), key=lambda item: -item[1])
    return f"- {measure}: " + "; ".join(name.format(per_cent(x)) for name, x in ranked) + "."


def section(answer: dict[str, Any], figures: str) -> list[str]:
    shown = [m for m in answer["measures"] if not m.endswith(ATTENTION)]
    lines = ["", f"## {answer['title']}", "", answer["method"], ""]
    lines += [f"![{answer['title']}]({figures}/{answer['name']}.svg)", ""]
    compared = any(
        len(point) == 7
        for measure in answer["measures"]
        for points in points_at(answer, measure).values()
        for point in points
        if point is not None
    )
    beside = f"; marks are beside *{answer['against']}*" if compared else ""
    lines += [f"k = {answer['top_k']}; {answer['x_label']}: {answer['at']}{beside}. In per cent, "
              "the mean over traces:", ""]  # fmt: skip
    lines += [order(answer, measure) for measure in shown]
    lines += ["", "<details><summary>By trace, with intervals</summary>", ""]
    for measure in answer["measures"]:
        lines += [*table(answer, measure), ""]
    lines += ["</details>"]
    return lines + [line for note in answer["notes"] for line in ("", f"Not asked: {note}.")]


def rendered(answers: list[dict[str, Any]], figures: str) -> str:
    """Markdown; `figures` is where the figures are, from the page's folder."""
    traces = {trace["name"]: trace for answer in answers for trace in answer["traces"]}
    lines = [ABOUT, "| trace | heads | keys | rows | blocks | model | text |", "|---" * 7 + "|"]
    for one in traces.values():
        names = ("name", "heads", "keys", "rows", "blocks", "model", "source")
        lines.append("| " + " | ".join(str(one[name]) for name in names) + " |")
    for answer in answers:
        lines += section(answer, figures)
    return "\n".join(lines) + "\n"


def write(answers: list[dict[str, Any]], folder: Path, path: Path) -> None:
    figures = os.path.relpath(folder, path.parent).replace(os.sep, "/")
    path.write_text(rendered(answers, figures))
