# SPDX-License-Identifier: Apache-2.0
"""The plots of README.md and docs/performance.md, as SVG that suits light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import matplotlib.axis
import matplotlib.lines
import matplotlib.ticker
import report_data as data
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report_tables import (
    BATCHES,
    K64,
    K128,
    LABELS,
    M4096,
    SKETCH,
    STEPS,
    TOP_K,
    TORCH,
    added,
    dense,
    keys_of,
)

FOLDER = data.ROOT / "docs" / "plots"
# Okabe and Ito's colours, which differ for colour-blind readers too, of one lightness that light
# and dark pages both set off; each indexer also has a marker.
COLOURS = {
    "dsa": "#d55e00",
    "misa": "#0072b2",
    "misa-dagger": "#3f9bdc",
    "hisa": "#009e73",
    "misa-r": "#b8860b",
    M4096: "#cc79a7",
    SKETCH: "#9467bd",
    "auto": "#cc79a7",
}
MARKERS = {"dsa": "o", "misa": "s", "misa-dagger": "D", "hisa": "^", "misa-r": "v", M4096: "P",
           SKETCH: "X", "auto": "P"}  # fmt: skip
# Stands for the page's text colour, which the style sheet of the SVG knows.
INK = "#123456"
STYLE = """<style>
 svg { --ink: #24292f; }
 @media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; } }
</style>
"""
SETTINGS = {
    "svg.hashsalt": "misa",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.markersize": 7,
}
PEERS = {TOP_K: "DeepGEMM's logits + misa.top_k", TORCH: "DeepGEMM's logits + torch.topk"}


def svg(figure: Figure, paper: str | None = None) -> str:
    """The figure on the page's background, or on `paper`, a colour of its own."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=paper is None, facecolor=paper or "none",
                   metadata={"Date": None, "Creator": None})  # fmt: skip
    text = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", out.getvalue())
    if paper is not None:
        return text
    return text.replace(INK, "var(--ink)").replace("<defs>", STYLE + " <defs>", 1)


def plain_ticks(axis: matplotlib.axis.Axis, ticks: list[float]) -> None:
    axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def value(figure: data.Figure | None) -> float | None:
    return None if figure is None else figure.value


def recall_time() -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    decode = data.decode_peers(64)["steps_us"]
    turns = data.cpu_peers()
    names = {"torch": ("h", "PyTorch"), "ggml": (">", "llama.cpp (ggml)")}
    on_cpu = {name: mark for name, mark in names.items() if name in turns}
    others = [(turns[name].value, marker) for name, (marker, _) in on_cpu.items()]
    gpu = data.gpu().removeprefix("NVIDIA ")
    panels = [
        (left, f"decode on one {gpu}, µs a step", "64 sequences of 128K tokens",
         {n: value(data.decode(n, 64)) for n in (*STEPS, SKETCH)},
         [(decode[TOP_K], "d"), (decode[TORCH], "*")], [100, 200, 400]),
        (middle, f"prefill on one {gpu}, µs a query", "of a context of 64K",
         {n: (value(data.step(n, K64)) or 0) / 2048 for n in STEPS},
         [(dense(K64) / 2048, "p")], [0.2, 0.5, 1]),
        (right, "on the CPU, ms a query", "of a context of 64K",
         {n: (value(data.cpu_ms(n)) or 0) / 256 for n in STEPS},
         others, [0.5, 1, 2, 5, 10]),
    ]  # fmt: skip
    for axes, title, below, ours, peers, ticks in panels:
        for name, time in ours.items():
            axes.plot(time, data.recall(name), MARKERS[name], color=COLOURS[name], clip_on=False)
        for time, marker in peers:
            axes.plot(time, 100, marker, markersize=11, markerfacecolor="none",
                      markeredgecolor=INK, clip_on=False)  # fmt: skip
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, ticks)
        axes.set_title(f"{title}\n{below}")
        axes.set_xlabel("← faster")
        axes.grid(True, color=INK, alpha=0.15)
    left.set_ylabel("recall of DSA's set, %")
    legend = [
        matplotlib.lines.Line2D([], [], linestyle="", marker=MARKERS[n], color=COLOURS[n],
                                label=LABELS[n])
        for n in (*STEPS, SKETCH)
    ]  # fmt: skip
    legend += [
        matplotlib.lines.Line2D([], [], linestyle="", marker=marker, markersize=9,
                                markerfacecolor="none", markeredgecolor=INK, label=f"peer: {label}")
        for marker, label in (("d", PEERS[TOP_K]), ("*", PEERS[TORCH]),
                              ("p", "DeepGEMM's logits + FlashInfer's top-k"), *on_cpu.values())
    ]  # fmt: skip
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=10)
    return figure


def decode() -> Figure:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    copy = data.record("gpu-floors").results["copy_tbps"]
    floor = [b * K128 * 132 / copy * 1e-6 for b in BATCHES]
    axes.plot(BATCHES, floor, color=INK, linewidth=1, label="read keys and scales once")
    for (name, label), style in zip(PEERS.items(), ("--", ":"), strict=True):
        peers = [data.decode_peers(b)["steps_us"][name] for b in BATCHES]
        axes.plot(BATCHES, peers, style, color=INK, marker="d", markerfacecolor="none",
                  label=f"peer: {label}")  # fmt: skip
    for name in ("dsa", "misa", "misa-r", M4096, SKETCH, "hisa"):
        steps = [value(data.decode(name, b)) for b in BATCHES]
        axes.plot(BATCHES, steps, color=COLOURS[name], marker=MARKERS[name], label=LABELS[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_ticks(axes.xaxis, list(BATCHES))
    plain_ticks(axes.yaxis, [5, 10, 20, 50, 100, 200, 400])
    axes.set_xlabel("sequences of 128K tokens")
    axes.set_ylabel("µs a step")
    axes.grid(True, color=INK, alpha=0.15)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=10)
    return figure


def prefill() -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    rate = data.record("gpu-floors").results["products_tflops"]
    axes: Axes
    for axes, keys in zip(figure.subplots(1, 2, sharey=True), (K64, K128), strict=True):
        peers = data.peers(keys)
        bars = [(f"peer: logits + {name}", added(peers["logits"], us).value, INK, None)
                for name, us in peers.items() if name != "logits"]  # fmt: skip
        for name in STEPS:
            step, reached = value(data.step(name, keys)), data.rate(name, keys)
            assert step is not None
            floor = step * reached / rate if reached else None
            bars.append((LABELS[name], step, COLOURS[name], floor))
        for row, (_, us, colour, floor) in enumerate(bars):
            axes.barh(row, us, color=colour, alpha=0.35 if colour == INK else 1)
            axes.annotate(f"{us:,.0f}", (us, row), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=10)  # fmt: skip
            if floor:
                axes.plot([floor, floor], [row - 0.4, row + 0.4], color=INK, linewidth=2)
        axes.set_yticks(range(len(bars)), [label for label, *_ in bars])
        axes.margins(x=0.15)
        axes.set_title(f"{keys_of(keys)} keys, µs a step")
    figure.supxlabel("a vertical line: products alone", fontsize=10, color=INK)
    return figure


def contexts() -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("dsa", "misa", "auto"):
        found = {
            entry["keys"]: entry["us"]
            for part in ("gpu-short", "gpu-steps-64", "gpu-sparse-64", "gpu-long")
            for entry in data.matching(part, indexer=name)
        }
        lengths = sorted(found)
        axes.plot(lengths, [found[k] for k in lengths], color=COLOURS[name], marker=MARKERS[name],
                  label=LABELS[name].strip("`"))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [1 << n for n in range(11, 21)]
    axes.xaxis.set_ticks(ticks, [keys_of(k) for k in ticks])
    plain_ticks(axes.yaxis, [100, 200, 500, 1000, 2000, 4000])
    axes.set_xlabel("keys")
    axes.set_ylabel("µs a step of 2048 queries")
    axes.grid(True, color=INK, alpha=0.15)
    axes.legend()
    return figure


def plots() -> Iterator[tuple[Path, str]]:
    with matplotlib.rc_context(SETTINGS):
        for make in (recall_time, decode, prefill, contexts):
            yield FOLDER / f"{make.__name__.replace('_', '-')}.svg", svg(make())
