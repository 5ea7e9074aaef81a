# SPDX-License-Identifier: Apache-2.0
"""Intervals by hand."""

import math

import numpy as np
import pytest

pytest.importorskip("torch")  # which the lab needs

from lab.statistics import Interval, difference, interval, share, widened  # noqa: E402


def test_equal_values_have_no_interval():
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert interval([3.0]) == (3, 3, 3)


def test_draws_of_two_documents():
    # Both the one, both the other or one of each: means of 0, 1 and 1/2, of which the first two
    # each come a quarter of the time.
    assert interval([0.0, 1.0]) == (0.5, 0, 1)


def test_draws_of_many_are_binomial():
    # Of 100 draws of 0 or 1, 39 ones or fewer come 1.8 % of the time, 40 or fewer 2.8 %.
    assert interval([0.0, 1.0] * 50) == (0.5, 0.4, 0.6)


def test_documents_are_drawn_whole():
    # Document a has 3 of the 4 values. Without documents, four of 0 would come (3/4)^4 = 32 %
    # of the time and four of 1 only 0.4 %, so that the upper end would be 3/4.
    values, documents = [0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]
    assert interval(values, documents) == (0.25, 0, 1)
    assert interval(values) == (0.25, 0, 0.75)
    # One document says nothing of others: its interval is its mean.
    assert interval([0.0, 1.0], ["a", "a"]) == (0.5, 0.5, 0.5)


def test_documents_count_by_their_values():
    # a and b: (2 + 1) / 3, twice a: 1, twice b: 1.
    assert interval([2.0, 0.0, 1.0], ["a", "a", "b"]) == (1, 1, 1)


def test_differences_are_of_pairs():
    # Values that vary widely, always half above the others.
    assert difference([0.5, 9.5, -4.5], [0.0, 9.0, -5.0]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError):
        difference([1.0], [1.0, 2.0])


def test_shares():
    # Wilson's interval, z = 1.96: for 8 of 10, (8 + z²/2) / (10 + z²) = 0.7167 is in the middle.
    assert share(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    # For none of n it ends at z² / (n + z²).
    assert share(0, 10) == pytest.approx((0, 0, 0.27753), abs=1e-4)
    assert share(10, 10) == pytest.approx((1, 0.72247, 1), abs=1e-4)
    assert share(50, 100) == pytest.approx((0.5, 0.4038, 0.5962), abs=1e-4)


def test_few_documents_widen():
    # t of 4 degrees of freedom is 2.776, and the variance of 5 values counts 5/4: 1.584 in all.
    found = widened(Interval(1, 0.9, 1.2), 5)
    assert found == pytest.approx((1, 1 - 0.1584, 1 + 0.2 * 1.584), abs=2e-3)
    assert widened(Interval(1, 0.9, 1.2), 1000) == pytest.approx((1, 0.9, 1.2), abs=1e-3)
    assert widened(Interval(1, 1, 1), 1) == (1, -math.inf, math.inf)


def test_intervals_of_few_documents_hold():
    values = np.random.default_rng(0).normal(size=(400, 5))
    held = 0
    for one in values:
        _, low, high = widened(interval(one), 5)
        held += low <= 0 <= high
    # 95 % are 380; four standard deviations are 17. Without widening it is about 336.
    assert held >= 363
