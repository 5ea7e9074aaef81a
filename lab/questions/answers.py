# SPDX-License-Identifier: Apache-2.0
"""What a question is, and the answers that it collects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..statistics import interval
from .trace import Trace, attended, blocks, of_blocks, shares

X = float | int | str
RECALL = "DSA's set kept"
ATTENTION = "its attention kept"
FAR = "its positions before the last k kept"


class Question(NamedTuple):
    """x_label: what the horizontal axis is. against: the series that others are compared with, row
    by row. at: the x of the page's table."""

    name: str
    title: str
    method: str
    x_label: str
    against: str
    at: X
    ask: Callable[[Sequence[Trace], int, Answers], None]


class Answers:
    """Values of rows by measure, trace, series and x, and why a trace has none."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str], dict[X, np.ndarray]] = {}
        self.notes: list[str] = []
        self._numbers: dict[tuple[str, str, str, X], np.ndarray] = {}

    def add(self, measure: str, trace: Trace, series: str, x: X, values: np.ndarray) -> None:
        """values: [T], NaN for rows that do not count."""
        if np.isnan(values).all():
            return
        self.values.setdefault((measure, trace.name, series), {})[x] = values
        self._numbers[measure, trace.name, series, x] = blocks(trace)

    def kept(
        self, trace: Trace, series: str, x: X, wanted: np.ndarray, found: np.ndarray, of: str = ""
    ) -> None:
        """The shares of the wanted positions, and of their attention, that are found."""
        prefix = f"{of}: " if of else ""
        self.add(prefix + RECALL, trace, series, x, shares(wanted, found))
        self.add(prefix + ATTENTION, trace, series, x, attended(trace, wanted, found))

    def measures(self, against: str) -> dict[str, dict[str, dict[str, list[list[Any]]]]]:
        """By measure, trace and series: for each x a list of x, the mean over blocks of
        neighbouring rows and its 95 % interval, and the same of the differences from `against` at
        this x, if it has one."""
        found: dict[str, dict[str, dict[str, list[list[Any]]]]] = {}
        for (measure, trace, series), by_x in self.values.items():
            base = self.values.get((measure, trace, against), {})
            points = []
            for x, values in by_x.items():
                numbers = self._numbers[measure, trace, series, x]
                point: list[Any] = [x, *summary(values, numbers)]
                if series != against and x in base and len(base[x]) == len(values):
                    point += summary(values - base[x], numbers)
                points.append(point)
            found.setdefault(measure, {}).setdefault(trace, {})[series] = points
        return found


def summary(values: np.ndarray, numbers: np.ndarray) -> list[float]:
    """The mean over blocks and its interval, by bootstrap over them."""
    return [round(v, 3) for v in interval(list(of_blocks(values, numbers)))]
