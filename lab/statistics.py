# SPDX-License-Identifier: Apache-2.0
"""Intervals of what is measured.

What one document says about another window of itself is not what it says about another document, so
documents are what is drawn again. Of few documents such an interval is too narrow: the programs say
how many there were, and `widened` is what to conclude from.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
Z = 1.959963984540054  # 97.5 % of a normal distribution are below


class Interval(NamedTuple):
    """A mean or share and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], documents: Sequence[Hashable] | None = None) -> Interval:
    """The mean, and the 2.5 and 97.5 percentiles of means of documents drawn again and again.

    documents: of which document each value is; all different if not given. A document is drawn
    with all its values.
    """
    data = np.asarray(values, dtype=np.float64)
    labels = list(range(len(data)) if documents is None else documents)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    of = [numbers[label] for label in labels]
    sums, counts = np.bincount(of, data), np.bincount(of)
    picks = np.random.default_rng(0).integers(0, len(counts), (RESAMPLES, len(counts)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))


def difference(
    values: Sequence[float],
    others: Sequence[float],
    documents: Sequence[Hashable] | None = None,
) -> Interval:
    """Of values less others, pair by pair, as `interval`."""
    return interval([a - b for a, b in zip(values, others, strict=True)], documents)


def share(hits: int, count: int) -> Interval:
    """Of hits among independent trials: Wilson's interval, which does not close at 0 or 1."""
    mean = hits / count
    middle = (mean + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * np.sqrt(mean * (1 - mean) / count + (Z / (2 * count)) ** 2)
    return Interval(mean, float(max(middle - half, 0)), float(min(middle + half, 1)))


def widened(found: Interval, count: int) -> Interval:
    """Of an interval of `interval` over `count` documents, one that holds 95 % where these are few,
    if their values are about normal: as far as Student's t and an unbiased variance reach, in place
    of a normal distribution and the documents' own. Of one document, everything."""
    if count < 2:
        return Interval(found.mean, -math.inf, math.inf)
    factor = _student(count - 1) / Z * math.sqrt(count / (count - 1))
    low, high = (found.mean + factor * (end - found.mean) for end in (found.low, found.high))
    return Interval(found.mean, low, high)


def _student(freedom: int) -> float:
    """97.5 % of Student's t are below; by Cornish's and Fisher's expansion, to 1 % from 4 on
    (Abramowitz and Stegun, 26.7.5)."""
    z, n = Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
