#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of docs/kernels, one an essay, as docs/kernels/figures/NAME.svg.

  scripts/figures.py            checks that they are what this program draws, and that every essay
                                has a paragraph, its figure, floors and, last, what was tried;
                                exits with 1 if not
  scripts/figures.py --write    writes them

A number that the code decides is read from it (constant), so that a figure goes stale with it. A
figure is 420 units wide, and its letters are at least 10.5 high: a phone shows them at about their
size. It has a background of its own, for light and dark pages alike.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle
from report_data import ROOT
from report_plots import COLOURS, SETTINGS, svg

FOLDER = ROOT / "docs" / "kernels" / "figures"
WIDTH = 420
SIZE = 10.5  # of letters
PAPER, INK, GREY, FAINT = "#f6f8fa", "#24292f", "#57606a", "#8c959f"
ON, MAYBE, OFF = COLOURS["misa"], COLOURS["misa-dagger"], "#c9d1d9"  # chosen, passed, dropped
MARK = "#b84d00"
# Where data lies.
MEMORY = {
    "device memory": "#d3dce6",
    "L2": "#c3e3d6",
    "shared memory": "#fbdf9d",
    "registers": "#f4c3b2",
    "memory": "#d3dce6",
    "L1 and L2": "#fbdf9d",
}


def constant(path: str, name: str) -> int:
    """The integer that a source of src/ gives this name."""
    match = re.search(rf"\b{name} = (\d+)(?:U? << (\d+))?\b", (ROOT / "src" / path).read_text())
    if match is None:
        raise SystemExit(f"figures.py: src/{path} has no integer {name}")
    return int(match[1]) << int(match[2] or 0)


class Drawing:
    """A figure in units of a letter's points, from the upper left corner."""

    def __init__(self, height: float, title: str, *memory: str) -> None:
        self.figure = Figure(figsize=(WIDTH / 72, height / 72))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self.text(12, 15, title, size=12, align="left", weight="bold")
        x = 12.0
        for kind in memory:
            self.rectangle(x, height - 19, 12, 10, MEMORY[kind], INK)
            self.text(x + 17, height - 14, kind, align="left")
            x += 36 + 6.1 * len(kind)

    def text(self, x: float, y: float, text: str, size: float = SIZE, align: str = "center",
             colour: str = INK, weight: str = "normal") -> None:  # fmt: skip
        self.axes.text(x, y, text, ha=align, va="center_baseline", fontsize=size, color=colour,
                       weight=weight, linespacing=1.25)  # fmt: skip

    def rectangle(self, x: float, y: float, w: float, h: float, fill: str,
                  edge: str = "none", width: float = 0.8) -> None:  # fmt: skip
        self.axes.add_patch(
            Rectangle((x, y), w, h, facecolor=fill, edgecolor=edge, linewidth=width)
        )

    def box(self, x: float, y: float, w: float, h: float, text: str, memory: str = "",
            colour: str = INK) -> None:  # fmt: skip
        """A box with a text, in the colour of where its data lies; white for what is done."""
        self.rectangle(x, y, w, h, MEMORY.get(memory, "white"), INK)
        self.text(x + w / 2, y + h / 2, text, colour=colour)

    def frame(self, x: float, y: float, w: float, h: float, text: str) -> None:
        """Around what a thread block or a cluster does."""
        self.axes.add_patch(FancyBboxPatch(
            (x + 5, y + 5), w - 10, h - 10, boxstyle="round,pad=5", facecolor="white",
            edgecolor=ON, linewidth=1.6))  # fmt: skip
        self.text(x + 8, y + 11, text, align="left", colour=ON, weight="bold")

    def arrow(self, x: float, y: float, to_x: float, to_y: float, text: str = "",
              colour: str = INK) -> None:  # fmt: skip
        self.axes.annotate("", (to_x, to_y), (x, y), arrowprops={
            "arrowstyle": "-|>,head_width=0.22,head_length=0.45", "color": colour, "linewidth": 1.1,
            "shrinkA": 0, "shrinkB": 0})  # fmt: skip
        if text:
            self.text(max(x, to_x) + 6, (y + to_y) / 2, text, align="left")

    def wedge(self, above: tuple[float, float], y: float, below: tuple[float, float],
              to_y: float) -> None:  # fmt: skip
        """A shadow from one stretch of a line to another: what is shown larger, or gathered."""
        self.axes.add_patch(Polygon([(above[0], y), (above[1], y), (below[1], to_y),
                                     (below[0], to_y)], facecolor=ON, alpha=0.12))  # fmt: skip

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str = INK,
             style: str = "-", width: float = 1.0) -> None:  # fmt: skip
        self.axes.plot([x, to_x], [y, to_y], style, color=colour, linewidth=width)

    def cells(self, x: float, y: float, w: float, h: float, count: int,
              fill: Callable[[int], str]) -> None:  # fmt: skip
        for i in range(count):
            self.rectangle(x + i * w / count, y, w / count, h, fill(i), "white", 0.6)

    def bars(self, x: float, y: float, w: float, h: float, values: Sequence[float],
             fill: Callable[[int], str]) -> None:  # fmt: skip
        """Bars that stand on y + h; a value of 1 is h high."""
        step = w / len(values)
        for i, value in enumerate(values):
            self.rectangle(x + i * step + 0.1 * step, y + h * (1 - value), 0.8 * step, h * value,
                           fill(i))  # fmt: skip
        self.line(x, y + h, x + w, y + h)


def scattered(count: int, seed: int) -> list[float]:
    """Numbers from 0.06 to 0.96, in no order, the same ones wherever this runs."""
    values = []
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) % (1 << 31)
        values.append(0.06 + 0.9 * (seed >> 16) / (1 << 15))
    return values


def best(values: Sequence[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def fused() -> Figure:
    tile = constant("fused/sm90_fp8_config.cuh", "kTileKeys")
    warpgroups = constant("fused/sm90_fp8_config.cuh", "kWarpgroups")
    columns = constant("score/sm90_fp8_config.cuh", "kProductColumns")
    keys = constant("score/sm90_fp8_config.cuh", "kProductKeys")
    per_block = constant("fused/work_plan.cpp", "kMaxSplitsPerBlock")
    rows, splits = 8, 33  # of MISA, at 64K keys
    d = Drawing(536, "Fused scoring: what one thread block does", "device memory",
                "shared memory", "registers")  # fmt: skip
    d.text(12, 34, f"keys of the context, in tiles of {tile}", align="left")
    own = {i * (splits // per_block) % splits for i in range(per_block)}
    d.cells(12, 43, 396, 16, splits, lambda i: ON if i in own else MEMORY["device memory"])
    d.text(408, 68, f"{per_block} of {splits} tiles are this thread block's", align="right",
           colour=ON)  # fmt: skip
    d.frame(8, 92, 404, 312, "")
    d.arrow(60, 61, 60, 106, "")
    d.text(67, 82, "TMA, a tile ahead", align="left")
    d.box(20, 108, 250, 26, f"tile: {tile} keys", "shared memory")
    d.box(282, 108, 118, 26, "the next tile", "shared memory")
    d.text(210, 152, f"{warpgroups} warpgroups multiply the tile by query rows of their own:")
    for i in range(warpgroups):
        x = 20 + 96 * i
        for top in (161, 221, 281, 334, 363):
            d.arrow(x + 46, top, x + 46, top + 12)
        d.box(x, 174, 92, 46, f"{columns} rows:\n{columns // rows} queries × {rows}",
              "shared memory")  # fmt: skip
        d.box(x, 234, 92, 46, f"product\n{keys} keys × {columns}", "registers")
        d.box(x, 294, 92, 40, f"clip, weight,\nadd the {rows}", "registers")
        d.box(x, 376, 92, 20, "queues", "shared memory")
    d.box(20, 347, 380, 16, "score > gate threshold of its query?  Else dropped.", colour=MARK)
    d.arrow(210, 404, 210, 422)
    d.text(217, 414, "1 score in 20", align="left")
    d.box(12, 424, 396, 24, "candidates: a list for each query and thread block", "device memory")
    # A product keeps the tensor cores busy for 256 of the 430 cycles until the next one.
    for i in range(warpgroups):
        y, x = 458 + 12 * i, 92 + 22.0 * i
        d.rectangle(92, y, 316, 9, MEMORY["registers"])
        while x < 400:
            d.rectangle(x, y, 13, 9, MARK)
            x += 88
    d.text(12, 464, "in turns:", align="left")
    d.text(12, 480, "product", align="left", colour=MARK)
    d.text(12, 494, "epilogue", align="left", colour="#a8553c")
    return d.figure


def select() -> Figure:
    short = constant("select/generic.hpp", "kShortColumns")
    d = Drawing(474, "Selection: how a row of scores becomes its top k", "device memory",
                "shared memory", "registers")  # fmt: skip
    k = 6
    scores = scattered(40, 4)
    ranked = sorted(scores, reverse=True)
    gate, kth = (ranked[10] + ranked[11]) / 2, ranked[k - 1]
    chosen = best(scores, k)
    passed = {i for i, score in enumerate(scores) if score > gate}

    def colour(i: int) -> str:
        return ON if i in chosen else MAYBE if i in passed else OFF

    d.text(12, 36, f"scores of a query, by position (here 40, and k = {k})", align="left")
    d.bars(12, 46, 396, 92, scores, colour)
    d.line(12, 46 + 92 * (1 - gate), 408, 46 + 92 * (1 - gate), MARK, "--", 1.3)
    d.text(12, 151, "1  a sample gives the gate threshold (dashed): more than k pass",
           align="left", colour=MARK)  # fmt: skip

    d.text(12, 178, "2  what passes: candidates in any order, a few for each thread", align="left")
    for n, i in enumerate(sorted(passed, key=lambda i: i * 17 % 40)):
        d.rectangle(12 + 36 * n, 187, 34, 24, MEMORY["registers"], colour(i), 2)
        d.text(29 + 36 * n, 199, str(i))

    d.text(12, 234, "3  a radix histogram of their scores finds where the k-th is", align="left")
    buckets = 9
    low, high = min(scores[i] for i in passed), max(scores)
    place = {i: min(buckets - 1, int((scores[i] - low) / (high - low) * buckets)) for i in passed}
    counts = [sum(b == place[i] for i in passed) for b in range(buckets)]
    bucket = next(place[i] for i in passed if scores[i] == kth)
    d.bars(12, 244, 250, 44, [count / max(counts) for count in counts],
           lambda b: MARK if b == bucket else ON if b > bucket else MAYBE)  # fmt: skip
    d.text(12, 297, "low", align="left", colour=GREY)
    d.text(262, 297, "high", align="right", colour=GREY)
    d.text(272, 258, "above it: selected", align="left", colour=ON)
    for line, text in enumerate(("its bucket: ranked", "directly, ties to", "lower positions")):
        d.text(272, 272 + 14 * line, text, align="left", colour=MARK)

    d.text(12, 326, "4  selected positions are marked in a bitmap", align="left")
    d.cells(12, 336, 396, 18, 40, lambda i: ON if i in chosen else MEMORY["shared memory"])
    d.wedge((12, 408), 356, (12, 12 + 42 * k), 389)
    d.text(12, 378, "5  a scan over it gives each its place: the result, by position", align="left")
    for n, i in enumerate(sorted(chosen)):
        d.rectangle(12 + 42 * n, 391, 40, 24, MEMORY["device memory"], ON, 2)
        d.text(32 + 42 * n, 403, str(i))
    d.text(12, 435, f"Rows of up to {short:,} scores are held whole, without 1, 2 and 4.",
           align="left")  # fmt: skip
    return d.figure


def score() -> Figure:
    keys = constant("score/sm90_fp8_config.cuh", "kProductKeys")
    products = constant("score/sm90_fp8_config.cuh", "kGatheredProducts")
    blocks = constant("score/sm90_fp8_config.cuh", "kGatheredBlocks")
    rows = constant("cuda/sm90.hpp", "kMaxRows")
    d = Drawing(492, "Gathered scoring: all heads on a query's candidates", "device memory", "L2",
                "shared memory", "registers")  # fmt: skip
    chosen = sorted(best(scattered(48, 9), 12))
    d.text(12, 34, "positions of the candidates, or of the blocks that a filter kept", align="left")
    for n, i in enumerate(chosen):
        d.box(12 + 33 * n, 43, 31, 20, str(i), "device memory")
        d.line(27.5 + 33 * n, 64, 12 + 8.25 * (i + 0.5), 85, FAINT)
    d.cells(12, 86, 396, 14, 48, lambda i: ON if i in chosen else MEMORY["L2"])
    d.text(12, 109, "keys of the context, 128 bytes each", align="left")
    d.frame(8, 138, 404, 268, "")
    d.arrow(112, 117, 112, 162)
    d.text(119, 128, "cp.async, 8 threads a key, one tile ahead", align="left")
    d.text(404, 150, f"a thread block: one query ({blocks} share an SM)", align="right",
           colour=ON, weight="bold")  # fmt: skip
    d.box(20, 164, 184, 26, f"tile: {products * keys} keys", "shared memory")
    d.box(216, 164, 184, 26, "the next tile, on its way", "shared memory")
    d.box(20, 196, 380, 26, f"rows of the query: up to {rows} heads, with their weights",
          "shared memory")  # fmt: skip
    for i, name in enumerate(("first", "other")):
        d.arrow(112 + 196 * i, 223, 112 + 196 * i, 235)
        d.box(20 + 196 * i, 236, 184, 26, f"{name} {keys} keys × {rows} rows", "registers")
    d.text(210, 275, "the second product runs during the epilogue of the first")
    group = rows // 4
    for lane in range(4):
        x = 20 + 96 * lane
        d.arrow(x + 46, 284, x + 46, 298)
        d.box(x, 299, 92, 44, f"lane {lane}: heads\n{group * lane} … {group * lane + group - 1}",
              "registers")  # fmt: skip
        d.arrow(x + 46, 344, x + 46, 362)
    d.box(20, 363, 380, 34, "one score a key: clip, weight and add 16 heads,\n"
          "then the four sums in order, times the key's scale", "registers")  # fmt: skip
    d.arrow(210, 406, 210, 424)
    d.box(12, 425, 396, 24, "a row of scores, in the order of positions", "device memory")
    d.text(12, 460, "its exact top k is the result", align="left")
    return d.figure


def route() -> Figure:
    means = constant("route/sm90_fp8_pooled.cu", "kTileMeans")
    samples = constant("core/recipe.hpp", "kMaxSamples")
    queries = constant("route/generic_config.cuh", "kThreadBlockQueries")
    d = Drawing(494, "Routing: which heads score for a query", "device memory", "shared memory",
                "registers")  # fmt: skip
    left, right, w = 18.0, 224.0, 178.0
    for x, name in ((8, "pooled: MISA"), (214, "sampled: MISA-R")):
        d.frame(x, 26, 198, 380, name)
    d.cells(left, 48, w, 14, 32, lambda i: MEMORY["device memory"])
    for i in range(5):
        d.line(left + i * w / 4, 46, left + i * w / 4, 64, INK, "-", 1.4)
    d.cells(right, 48, w, 14, 32, lambda i: ON if i % 4 == 0 else MEMORY["device memory"])
    d.text(left, 74, "keys, in blocks of 1024", align="left")
    d.text(right, 74, f"every s-th key, up to {samples}", align="left", colour=ON)
    d.box(left, 101, w, 36, f"block means, {means} a tile,\nin two fp16 parts", "shared memory")
    d.box(right, 101, w, 36, f"{samples} sampled keys,\nin fp16", "shared memory")
    for x, products in (
        (left, f"q · mean: 64 heads × {means}"),
        (right, f"q · k: 64 heads × {samples}"),
    ):
        for top in (82, 138, 194):
            d.arrow(x + 40, top, x + 40, top + 18)
        d.box(x, 157, w, 36, f"x = {products}\na warp has 16 heads", "registers")
        d.text(x, 220, "of a head's products:", align="left")

    x = [-0.9, -0.7, -0.55, -0.35, -0.2, -0.05, 0.12, 0.3, 0.42, 0.6, 0.85]
    clipped = [max(0.0, value) for value in x]
    d.bars(left + 6, 230, 76, 44, clipped, lambda i: ON)
    d.text(left + 92, 246, "Σ max(0, x)", align="left", colour=ON)
    d.text(left + 92, 260, "over blocks", align="left", colour=ON)
    across, down = 78.0, 42.0
    for a, b in zip(x, clipped, strict=True):
        d.axes.plot(right + 6 + across * (a + 1) / 2, 274 - down * b, "o", color=ON, markersize=3.5)
    centre = sum(x) / len(x)
    slope = sum((a - centre) * b for a, b in zip(x, clipped, strict=True)) / sum(
        (a - centre) ** 2 for a in x)  # fmt: skip
    ends = [sum(clipped) / len(x) + slope * (a - centre) for a in (-1, 1)]
    d.line(right + 6, 274 - down * ends[0], right + 6 + across, 274 - down * ends[1], MARK,
           width=1.4)  # fmt: skip
    d.text(right + 92, 238, "max(0, x)", align="left", colour=ON)
    d.text(right + 92, 252, "and its line,", align="left", colour=MARK)
    d.text(right + 92, 266, "slope p", align="left", colour=MARK)

    for at, count, seed, value, rest in (
        (left, 8, 5, "times |w|: each head's energy", ("the others are left out",)),
        (right, 7, 11, "mostly |w| · error of the line",
         ("the others become one row,", "q̄ = Σ w · p · q, without a clip")),
    ):  # fmt: skip
        values = scattered(26, seed)
        chosen = best(values, count)
        d.arrow(at + 40, 280, at + 40, 292)
        d.text(at, 300, value, align="left")
        d.bars(at, 308, w, 34, values, lambda i, chosen=chosen: ON if i in chosen else OFF)
        d.text(at, 358, f"the {count} largest score", align="left", colour=ON)
        for line, text in enumerate(rest):
            d.text(at, 374 + 15 * line, text, align="left", colour=GREY)
        d.arrow(at + 89, 406, at + 89, 423)
    d.box(12, 424, 190, 20, "heads", "device memory")
    d.box(218, 424, 190, 20, "heads, residual row", "device memory")
    d.text(12, 459, f"A thread block routes up to {queries} consecutive queries.", align="left")
    return d.figure


def filtering() -> Figure:
    tile = constant("filter/sm90_fp8_block_scores.cu", "kTileMeans")
    d = Drawing(424, "The block filter: which blocks a query keeps", "device memory",
                "shared memory", "registers")  # fmt: skip
    count, kept = 22, 7
    scores = scattered(count, 21)
    ends = {0, count - 1}
    chosen = {i + 1 for i in best(scores[1:-1], kept - 2)}

    def colour(i: int, other: str) -> str:
        return MARK if i in ends else ON if i in chosen else other

    step = 396 / count
    d.text(12, 34, "keys of the context, in blocks of 128", align="left")
    d.cells(12, 43, 396, 16, count, lambda i: MEMORY["device memory"])
    for i in range(count + 1):
        d.line(12 + i * step, 42, 12 + i * step, 60, INK, "-", 1.2)
    for i in range(count):
        d.arrow(12 + (i + 0.5) * step, 61, 12 + (i + 0.5) * step, 74, colour=FAINT)
        d.rectangle(12 + (i + 0.25) * step, 75, step / 2, 12, MEMORY["device memory"], INK)
    d.text(12, 97, "the mean of each block, for all queries of a sequence", align="left")
    d.frame(8, 118, 404, 118, "")
    d.arrow(60, 105, 60, 138)
    d.text(404, 130, "a thread block: 4 queries, a warpgroup each", align="right", colour=ON,
           weight="bold")  # fmt: skip
    d.box(20, 140, 186, 36, f"tile of {tile} means\nin two fp16 parts", "shared memory")
    d.box(216, 140, 184, 36, "64 heads of the query,\n16 a warp, in fp16", "registers")
    d.arrow(113, 177, 113, 190)
    d.arrow(308, 177, 308, 190)
    d.box(
        20, 191, 380, 36, "score of a block = Σ w · max(0, q · mean)\nover all heads", "registers"
    )
    d.arrow(60, 236, 60, 254)
    d.text(67, 247, "a row of block scores", align="left")
    d.bars(12, 256, 396, 54, scores, lambda i: colour(i, OFF))
    d.text(12, 322, "first and last: always kept", align="left", colour=MARK)
    d.text(408, 322, "the best 62 of the others", align="right", colour=ON)
    d.arrow(60, 331, 60, 350)
    d.text(67, 341, "a warp a query finds the last of them, bit by bit", align="left")
    d.cells(12, 352, 396, 16, count, lambda i: colour(i, MEMORY["device memory"]))
    d.text(12, 380, "64 kept blocks: 8192 keys, which all heads score", align="left")
    return d.figure


def decode() -> Figure:
    stages = constant("score/sm90_fp8_paged.cu", "stages")
    tile = constant("score/sm90_fp8_paged.cu", "tile_keys")
    groups = constant("score/sm90_paged_config.cuh", "kPagedWarpgroups")
    most = constant("select/cluster.cu", "kMaxCluster")
    d = Drawing(566, "Decode: few queries, each of a long context of its own", "device memory",
                "shared memory", "registers")  # fmt: skip
    shades = [COLOURS[name] for name in ("misa", "hisa", "misa-r", "auto")]
    owners = [sequence for sequence, tiles in enumerate((9, 4, 14, 6)) for _ in range(tiles)]
    total = len(owners)
    d.text(12, 34, "a cache's pages: each sequence's keys (a colour) lie scattered", align="left")
    d.cells(12, 43, 396, 16, total, lambda i: shades[owners[i * 14 % total]])
    d.arrow(60, 60, 60, 84)
    d.text(67, 72, f"by lengths and block tables: one list of tiles of {tile} keys", align="left")
    d.cells(12, 86, 396, 16, total, lambda i: shades[owners[i]])
    for i in range(12):
        d.line(12 + i * 36, 83, 12 + i * 36, 105, INK, "-", 1.8)
    d.wedge((156, 192), 106, (12, 408), 130)
    d.text(12, 114, "cut into equal shares, one for each SM's thread block", align="left")

    d.frame(8, 126, 404, 166, "a thread block: one sequence's end, the next one's start")
    d.text(20, 154, f"{groups} producer warps fetch by TMA, {stages} tiles in flight", align="left")
    d.cells(20, 162, 380, 18, stages, lambda i: MEMORY["shared memory"])
    for i in range(groups):
        x = 20 + 96 * i
        d.arrow(x + 46, 181, x + 46, 192)
        d.box(x, 193, 92, 42, f"{tile} keys × rows\nof its queries", "registers")
        d.arrow(x + 46, 236, x + 46, 246)
        d.box(x, 247, 92, 36, "clip, weight,\nadd the rows", "registers")
    d.arrow(210, 292, 210, 308)
    d.text(217, 300, "every key is read once", align="left")
    d.text(12, 318, "a row of scores for each query", align="left")
    d.rectangle(12, 326, 396, 14, MEMORY["device memory"], INK)

    d.frame(8, 368, 404, 146, f"a cluster of up to {most} thread blocks (here 4) shares a long row")
    for i in range(4):
        x = 20 + 96 * i
        d.line(12 + 99 * i, 323, 12 + 99 * i, 343, INK, "-", 1.4)
        d.arrow(61 + 99 * i, 344, 61 + 99 * i, 366)
        d.box(x, 390, 92, 40, "leader: finds\nthe k-th entry" if i == 0 else
              "scores above\nthe threshold", "shared memory")  # fmt: skip
        if i > 0:
            d.line(x + 46, 431, x + 46, 439)
        d.arrow(x + 46, 462, x + 46, 474)
        d.box(x, 475, 92, 30, "its positions", "registers")
    d.line(56, 439, 354, 439)
    d.arrow(56, 439, 56, 432)
    d.text(210, 452, "candidates go to the leader, the k-th entry to all")
    d.arrow(210, 514, 210, 524)
    d.box(12, 525, 396, 18, "top k of the query, in order of positions", "device memory")
    return d.figure


def step() -> Figure:
    d = Drawing(494, "A prefill step: its kernels, from top to bottom")
    indexers = ("DSA", "MISA", "HISA", "MISA†", "MISA-R,\nwith m")
    stages = (
        ("scales of the keys", "finite, or NaN", "11111"),
        ("block means", "of 1024 keys; HISA: 128", "01110"),
        ("route", "the query's heads", "01011"),
        ("filter", "64 blocks of the query", "00100"),
        ("score samples", "2048 keys of a query", "11011"),
        ("gate threshold", "more than k should pass", "11011"),
        ("score every key", "what passes is written", "11011"),
        ("score kept blocks", "8192 keys of a query", "00100"),
        ("select", "the top k, or m", "11111"),
        ("fallback", "queries misled by the gate", "11011"),
        ("re-rank", "all heads on m keys", "00011"),
        ("select", "the top k of m", "00011"),
    )
    first, column, top, row = 208.0, 44.0, 64.0, 35.0
    for c, name in enumerate(indexers):
        d.text(first + c * column, 44, name, weight="bold")
    for r, (name, what, _) in enumerate(stages):
        d.rectangle(12, top + r * row, 396, row - 2, "white")
        d.text(18, top + r * row + 10, name, align="left", weight="bold")
        d.text(18, top + r * row + 23, what, align="left", colour=GREY)
    for c in range(len(indexers)):
        x = first + c * column
        at = [top + r * row + 16 for r, (_, _, runs) in enumerate(stages) if runs[c] == "1"]
        d.line(x, at[0], x, at[-1], ON, width=2)
        d.axes.plot([x] * len(at), at, "o", color=ON, markersize=9)
    return d.figure


def cpu() -> Figure:
    queries = constant("indexers/cpu_chunk.cpp", "kMaxBlockQueries")
    rows = constant("score/cpu-inl.h", "kRows")
    d = Drawing(464, "A step on the CPU: what one thread does", "memory", "L1 and L2", "registers")
    count = 22
    stride = count * 618 // 1000
    while math.gcd(stride, count) > 1:
        stride += 1
    visited = [i * stride % count for i in range(5)]
    d.text(12, 34, "keys of the context, in pages of 64", align="left")
    d.cells(12, 43, 396, 18, count, lambda i: ON if i in visited else MEMORY["memory"])
    for n, i in enumerate(visited):
        d.text(12 + (i + 0.5) * 396 / count, 52, str(n + 1), colour="white", weight="bold")
    d.text(12, 72, "visited in golden-ratio steps, so that the first are a fair sample",
           align="left", colour=ON)  # fmt: skip
    d.frame(8, 102, 404, 264, "")
    d.arrow(60, 81, 60, 122)
    d.text(67, 92, "packed once, for all these queries", align="left")
    d.text(404, 114, f"up to {queries} queries, one after the other", align="right", colour=ON,
           weight="bold")  # fmt: skip
    d.box(20, 124, 170, 38, "page: 64 keys, a key a lane,\nfp32 or pairs of bf16", "L1 and L2")
    d.box(212, 124, 188, 38, "rows of the query: its heads,\nand the residual row", "L1 and L2")
    d.arrow(105, 163, 105, 180)
    d.arrow(306, 163, 306, 180)
    d.box(20, 181, 380, 52, f"{rows} rows × 4 vectors of 16 keys: {rows * 4} sums\n"
          "(AVX-512 BF16: 32 products an instruction)", "registers")  # fmt: skip
    d.arrow(210, 234, 210, 249)
    d.box(20, 250, 380, 36, "clip, weight, add over the rows: 64 scores", "registers")
    d.arrow(210, 287, 210, 313)
    d.text(217, 300, "above the query's threshold", align="left", colour=MARK)
    d.box(20, 315, 190, 42, "the best k so far", "L1 and L2")
    d.box(210, 315, 190, 42, "room for k more; when full,\nk are kept: a new threshold",
          "L1 and L2")  # fmt: skip
    d.arrow(112, 366, 112, 390)
    d.arrow(308, 366, 308, 390)
    d.text(210, 378, "after the last page")
    d.box(12, 391, 192, 40, "top k, sorted\nby position", "memory")
    d.box(216, 391, 192, 40, "or m candidates, which\nall heads score again", "memory")
    return d.figure


FIGURES = {"cpu": cpu, "decode": decode, "filter": filtering, "fused": fused, "route": route,
           "score": score, "select": select, "step": step}  # fmt: skip


# How an essay begins: its heading, a paragraph, its figure, the floors.
OPENING = r"# .+\n\n(?:.+\n)+\n!\[[^]]+\]\(figures/{name}\.svg\)\n\n## Floors\n"


def faults_of_essay(name: str, text: str) -> list[str]:
    faults = []
    if not re.match(OPENING.format(name=name), text):
        faults.append(f"{name}.md: expected a paragraph, figures/{name}.svg and then the floors")
    if not re.findall("^## (.+)", text, re.MULTILINE)[-1].startswith("Tried and "):
        faults.append(f"{name}.md: expected what was tried at its end")
    return faults


def main() -> int:
    write = sys.argv[1:] == ["--write"]
    if sys.argv[1:] and not write:
        sys.exit(__doc__)
    essays = {path.stem: path.read_text() for path in FOLDER.parent.glob("*.md")}
    faults = [fault for name, text in essays.items() for fault in faults_of_essay(name, text)]
    faults += [f"{name}.md has no figure" for name in essays.keys() - FIGURES.keys()]
    with matplotlib.rc_context(SETTINGS):
        for name, draw in FIGURES.items():
            path = FOLDER / f"{name}.svg"
            drawn = svg(draw(), PAPER)
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(drawn)
            elif not path.exists() or path.read_text() != drawn:
                faults.append(f"{path.name} is stale: scripts/figures.py --write")
    for fault in sorted(faults):
        print(f"figures.py: {fault}", file=sys.stderr)
    return int(faults != [])


if __name__ == "__main__":
    sys.exit(main())
