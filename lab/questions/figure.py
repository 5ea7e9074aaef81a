# SPDX-License-Identifier: Apache-2.0
"""A question's figure: a row of panels for each measure, a column for each trace."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import style
from .answers import ATTENTION

DASHES = ("-", "--", "-.", ":", (0, (7, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 0.6)))
SETTINGS = style.SETTINGS | {"lines.linewidth": 1.7}
WIDTH, HEIGHT = 3.3, 2.2  # of a panel, inches


def drawn(answer: dict[str, Any]) -> Figure:
    """The figure of what __main__ writes as a question's JSON, without the measures of attention.
    Bands are 95 % intervals."""
    measures = {m: found for m, found in answer["measures"].items() if not m.endswith(ATTENTION)}
    traces = list(dict.fromkeys(name for by_trace in measures.values() for name in by_trace))
    series = list(
        dict.fromkeys(s for by_trace in measures.values() for one in by_trace.values() for s in one)
    )
    places = {x: i for i, x in enumerate(answer["xs"])}
    legend = 0.22 * ((len(series) + 1) // 2) + 0.3
    size = max(WIDTH * len(traces), 2 * WIDTH), HEIGHT * len(measures) + legend
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(measures), len(traces), squeeze=False, sharex=True, sharey="row")
    entries: dict[str, Any] = {}
    for row, (measure, by_trace) in zip(grid, measures.items(), strict=True):
        row[0].set_ylabel(textwrap.fill(f"{measure},\N{NO-BREAK SPACE}%", 24), fontsize=9)
        for axes, trace in zip(row, traces, strict=True):
            axes.grid(axis="y", alpha=0.4, linewidth=0.6)
            axes.tick_params(left=False, bottom=False)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set_xticks(range(len(places)), [str(x) for x in places])
            for i, name in enumerate(series):
                points = by_trace.get(trace, {}).get(name, [])
                at = [places[p[0]] for p in points]
                mean, low, high = ([100 * p[j] for p in points] for j in (1, 2, 3))
                colour = style.COLOURS[i % len(style.COLOURS)]
                (line,) = axes.plot(at, mean, color=colour, linestyle=DASHES[i % len(DASHES)])
                axes.fill(at + at[::-1], low + high[::-1], color=colour, alpha=0.15, linewidth=0)
                entries[name] = line
    for axes, trace in zip(grid[0], traces, strict=True):
        axes.set_title(trace)
    for axes in grid[-1]:
        axes.set_xlabel(answer["x_label"])
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=2, fontsize=9
    )
    return figure


def write(answer: dict[str, Any], path: Path) -> None:
    """An SVG, the same for the same answer."""
    out = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure = drawn(answer)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text(smaller(out.getvalue()))


def smaller(svg: str) -> str:
    """An SVG of matplotlib, in which no path is curved and no group has attributes, without what no
    reader sees: groups, long lists of fonts, parts of points and line breaks; each style once."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<!DOCTYPE[^>]*>", "", svg, flags=re.S)
    svg = re.sub(r"<g id=\"[^\"]*\"/?>|</?g>| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg)
    svg = re.sub(r"\s*\n(L )?(?=[-\dzM\"])", " ", svg)

    def whole(found: re.Match[str]) -> str:
        return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.0f}", found[0])

    svg = re.sub(r" (d|x|y|transform)=\"[^\"]*\"", whole, svg)
    names: dict[str, str] = {}
    svg = re.sub(
        r"style=\"([^\"]*)\"",
        lambda found: f'class="{names.setdefault(found[1], f"s{len(names)}")}"',
        svg,
    )
    sheet = "\n".join(f".{name} {{ {style} }}" for style, name in names.items())
    svg = svg.replace("</style>", f"\n{sheet}\n</style>", 1)
    return re.sub(r"\n\s*", "\n", svg)
