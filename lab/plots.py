# SPDX-License-Identifier: Apache-2.0
"""The figures of the lab's report, as SVG."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from . import style
from .claims import FLOOR, Testbed, by_label, where

MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":")
MARKED = 8  # points of a line at most
SETTINGS = style.SETTINGS | {"lines.markersize": 4, "lines.linewidth": 1.3}
WIDTH, HEIGHT = 4.2, 2.8  # of a panel, inches
SHOWN = ("misa:h=8", "misa-dagger:h=8:m=4k", "misa-r:h=3", "misa-r:h=3:m=4k", "hisa", FLOOR)
NEEDLES = ("dense", "dsa", "misa:h=8", "misa-r:h=7", "misa-r:h=3:m=4k", "recency")
CHOICES = {"best": "best", "indexer": "indexer", "recent": "last positions", "random": "random"}


def svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", out.getvalue())
    return re.sub(r"(\d\.\d\d)\d+", r"\1", text)  # of a point


def _panels(count: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(WIDTH * count, HEIGHT + 0.7), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=True)[0])


def _series(axes: Any, i: int, label: str, xs: list[Any], found: list[Any]) -> None:
    """A line through means, and a band of intervals; in percent."""
    mean, low, high = ([100 * one[j] for one in found] for j in range(3))
    colour = style.COLOURS[i % len(style.COLOURS)]
    marker = MARKERS[i % len(MARKERS)] if len(xs) <= MARKED else None
    axes.plot(xs, mean, DASHES[i % len(DASHES)], color=colour, marker=marker, label=label)
    axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # A letter is about 0.067 inches wide, a line with its gaps 0.6.
    column = 0.6 + 0.067 * max(map(len, labels), default=0)
    columns = max(1, min(3, int(figure.get_figwidth() / column)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def _shown(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The choices of SHOWN that there are; `hisa` with any number of blocks."""
    found = {label.split(":blocks")[0]: one for label, one in by_label(results).items()}
    return {label: found[label] for label in SHOWN if label in found}


def attention(testbed: Testbed) -> Figure | None:
    """What positions keep of the attention, layer by layer, at the greatest k."""
    files = testbed.found["quality"]
    if not files:
        return None
    figure, panels = _panels(len(files))
    for axes, one in zip(panels, files, strict=True):
        top_k = max(entry["top_k"] for entry in one["layers"])
        entries = [entry for entry in one["layers"] if entry["top_k"] == top_k]
        layers = [entry["layer"] for entry in entries]
        for i, (choice, label) in enumerate(CHOICES.items()):
            _series(axes, i, label, layers, [entry[choice] for entry in entries])
        axes.set(title=where({**one, "top_k": top_k}), xlabel="layer")
    panels[0].set_ylabel("of the attention, %")
    _legend(figure, panels[0])
    return figure


def layers(testbed: Testbed) -> Figure | None:
    """The recall of DSA's set, layer by layer."""
    files = testbed.found["selection"]
    if not files:
        return None
    figure, panels = _panels(len(files))
    for axes, one in zip(panels, files, strict=True):
        for i, (label, result) in enumerate(_shown(one["results"]).items()):
            of = result["layers"]
            _series(axes, i, label, [x["layer"] for x in of], [x["recall"] for x in of])
        axes.set(title=where(one), xlabel="layer")
    panels[0].set_ylabel("of DSA's set, %")
    _legend(figure, panels[0])
    return figure


def lengths(testbed: Testbed) -> Figure | None:
    """The recall of DSA's set by length, a panel for each k that was measured at two or more."""
    by_k: dict[int, list[dict[str, Any]]] = {}
    for one in testbed.found["selection"]:
        by_k.setdefault(one["top_k"], []).append(one)
    by_k = {top_k: files for top_k, files in sorted(by_k.items()) if len(files) > 1}
    if not by_k:
        return None
    figure, panels = _panels(len(by_k))
    for axes, (top_k, files) in zip(panels, by_k.items(), strict=True):
        for i, label in enumerate(SHOWN):
            at = [(one["length"], _shown(one["results"]).get(label)) for one in files]
            there = [(length, result["recall"]) for length, result in at if result]
            if there:
                xs, found = map(list, zip(*there, strict=True))
                _series(axes, i, label, xs, found)
        axes.set_xscale("log", base=2)
        axes.set_xticks([one["length"] for one in files], [f"{x['length']:,}" for x in files])
        axes.set(title=f"k = {top_k:,}", xlabel="tokens")
    panels[0].set_ylabel("of DSA's set, %")
    _legend(figure, panels[0])
    return figure


def divergence(testbed: Testbed) -> Figure | None:
    """KL(DSA || other) of the next token, a panel for each context."""
    files = testbed.found["language"]
    if not files:
        return None
    most = max(len(one["text"]) for one in files)
    figure = Figure(figsize=(WIDTH * len(files) + 1.5, 0.25 * most + 1.2), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        there = [entry for entry in one["text"] if entry["kl"][0] > 0]
        for i, entry in enumerate(sorted(there, key=lambda entry: entry["kl"][0])):
            mean, low, high = entry["kl"]
            axes.plot([low, high], [i, i], color=style.COLOURS[0], linewidth=3, alpha=0.3)
            axes.plot([mean], [i], color=style.COLOURS[0], marker="o")
        axes.set_yticks(
            range(len(there)),
            [entry["label"] for entry in sorted(there, key=lambda entry: entry["kl"][0])],
        )
        if there:
            axes.set_xscale("log")
        axes.set(title=where(one), xlabel="KL(DSA || other), nats")
        axes.grid(axis="x", alpha=0.3)
    return figure


def needles(testbed: Testbed) -> Figure | None:
    """Of single needles, by length and depth, how many answers are exact, and below how many
    layers select the needle's value."""
    files = testbed.found["retrieval"]
    results = [{x["label"]: x for x in one["results"] if x["kind"] == "needle"} for one in files]
    labels = [label for label in NEEDLES if any(label in of for of in results)]
    if not labels:
        return None
    size = 1.3 + 0.45 * len(files)
    figure = Figure(figsize=(size * len(labels) + 1, 5), layout="constrained")
    grid = figure.subplots(2, len(labels), squeeze=False, sharey=True, sharex=True)
    mesh = None
    for row, part in zip(grid, ("answers", "selection"), strict=True):
        for axes, label in zip(row, labels, strict=True):
            found = [of.get(label, {}).get(part, {}).get("by_depth", []) for of in results]
            depths = sorted({cell["depth"] for column in found for cell in column})
            shares = np.full((len(depths), len(files)), np.nan)
            for x, column in enumerate(found):
                for cell in column:
                    shares[depths.index(cell["depth"]), x] = 100 * cell["share"][0]
            if depths:
                mesh = axes.pcolormesh(shares, vmin=0, vmax=100, cmap="cividis")
                axes.set_ylim(len(depths), 0)
                axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:.2f}" for depth in depths])
            names = [f"{one['length'] // 1024}K" for one in files]
            axes.set_xticks(np.arange(len(files)) + 0.5, names)
            axes.set_title(label, fontsize=8)
        row[0].set_ylabel({"answers": "exact answers", "selection": "selected"}[part])
    if mesh is not None:
        figure.colorbar(mesh, ax=grid, label="%")
    return figure


FIGURES = {
    "attention": (attention, "What positions keep of the attention, by layer"),
    "layers": (layers, "What each choice keeps of DSA's set, by layer"),
    "lengths": (lengths, "What each choice keeps of DSA's set, by length"),
    "needles": (needles, "Needles by length and depth: exact answers, and selected by layers"),
    "divergence": (divergence, "How far the next token's distribution is from DSA's"),
}


def drawn(testbed: Testbed) -> dict[str, str]:
    """SVG by the name in FIGURES, where there is something to draw."""
    with matplotlib.rc_context(SETTINGS):
        made = {name: draw(testbed) for name, (draw, _) in FIGURES.items()}
        return {name: svg(figure) for name, figure in made.items() if figure is not None}
