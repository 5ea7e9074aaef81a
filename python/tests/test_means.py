# SPDX-License-Identifier: Apache-2.0
"""Routing and the block filter from given block means, against the specification in NumPy and
against the selection from the keys of those means."""

from __future__ import annotations

import numpy as np
import pytest

import misa
from inputs import Inputs, check_set, dot_error, gamma, random_inputs, score_error
from misa import reference
from misa.reference import Row

BLOCK = 64
PACK = [(0, 1), (0, 64), (0, 65), (0, 640), (0, 700), (700, 1700), (700, 1000), (3, 3), (40, 9)]
UNIT = {"reference": 2.0**-53, "auto": 2.0**-24}
"""The unit roundoff that a backend computes with."""
backends = pytest.mark.parametrize("backend", list(UNIT))
dtypes = pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])


def means_of(row: Row) -> np.ndarray:
    """[blocks, D] float32, of one that sees nothing too."""
    if len(row.k) == 0:
        return np.zeros((0, row.q.shape[1]), np.float32)
    return reference.block_means(row, BLOCK).astype(np.float32)


def given_means(inputs: Inputs) -> dict[str, np.ndarray]:
    """Arguments of misa.route_from_means: each query has rows of its own."""
    of = reference.rows(**inputs.arguments())
    whole = np.array([len(row.k) // BLOCK for row in of])
    blocks = np.array([len(means_of(row)) for row in of])
    starts = np.cumsum(blocks) - blocks
    return {
        "q": inputs.q,
        "w": inputs.w,
        "means": np.concatenate([means_of(row) for row in of]),
        "starts": starts.astype(np.int32),
        "ends": (starts + whole).astype(np.int32),
        "partial": np.where(blocks > whole, starts + whole, -1).astype(np.int32),
    }


def energies(row: Row, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """[H] the pooled router's values on given means, and what they may be off by."""
    means, w = means_of(row).astype(np.float64), np.abs(row.w)
    terms = w * (np.abs(means) @ np.abs(row.q).T)
    error = (w * dot_error(row.q, means, unit) + gamma(len(means) + 2, unit) * terms).sum(0)
    return (w * reference.relu(means @ row.q.T)).sum(0), error


@backends
@dtypes
def test_route_against_the_specification(dtype: str, backend: str) -> None:
    for seed in range(5):
        inputs = random_inputs(PACK, dtype=dtype, seed=seed)
        heads = misa.route_from_means(**given_means(inputs), heads=3, backend=backend)
        assert heads.shape == (len(PACK), 3) and heads.dtype == np.int32
        for t, row in enumerate(reference.rows(**inputs.arguments())):
            if len(row.k) == 0:
                assert (heads[t] == -1).all()
                continue
            assert (np.diff(heads[t]) > 0).all()
            check_set(heads[t], *energies(row, UNIT[backend]), 3, f"query {t}, seed {seed}")


@backends
@dtypes
def test_keep_blocks_against_the_specification(dtype: str, backend: str) -> None:
    for seed in range(5):
        inputs = random_inputs(PACK, dtype=dtype, seed=seed)
        kept = misa.keep_blocks_from_means(**given_means(inputs), filter_blocks=5, backend=backend)
        assert kept.shape == (len(PACK), 5) and kept.dtype == np.int32
        for t, row in enumerate(reference.rows(**inputs.arguments())):
            of_blocks = Row(row.q, row.w, means_of(row).astype(np.float64), False)
            blocks = len(of_blocks.k)
            found = kept[t][: min(blocks, 5)]
            assert (kept[t][len(found) :] == -1).all() and (np.diff(found) > 0).all()
            if blocks <= 5:
                assert np.array_equal(found, np.arange(blocks))
                continue
            assert found[0] == 0 and found[-1] == blocks - 1
            every = np.arange(len(row.w))
            exact = reference.scores(of_blocks, of_blocks.k, every)[1:-1]
            error = score_error(of_blocks, every, None, UNIT[backend])[1:-1]
            check_set(found[1:-1] - 1, exact, error, 3, f"query {t}, seed {seed}")


@backends
@dtypes
def test_as_select_does(dtype: str, backend: str) -> None:
    """Inputs without near ties: the values that decide are farther apart than both calls may be
    off by, however the means were summed."""
    far_heads = far_blocks = 0
    for seed in range(3):
        inputs = random_inputs(PACK, dtype=dtype, seed=seed)
        arguments = inputs.arguments()
        config = misa.Config("misa", top_k=1, heads=3, block=BLOCK)
        wanted = misa.select(**arguments, config=config, heads=True, backend=backend).heads
        heads = misa.route_from_means(**given_means(inputs), heads=3, backend=backend)
        # So many positions that every kept block has one that is selected.
        top_k = 4 * BLOCK + 1
        config = misa.Config("hisa", top_k=top_k, filter_block=BLOCK, filter_blocks=5)
        indices = misa.select(**arguments, config=config, backend=backend).indices
        kept = misa.keep_blocks_from_means(**given_means(inputs), filter_blocks=5, backend=backend)
        for t, row in enumerate(reference.rows(**arguments)):
            if len(row.k) == 0:
                continue
            exact, error = energies(row, UNIT["auto"] * BLOCK)
            largest = np.sort(exact)[::-1]
            if largest[2] - largest[3] > 2 * error.max():
                far_heads += 1
                assert np.array_equal(heads[t], wanted[t])
            of_blocks = Row(row.q, row.w, means_of(row).astype(np.float64), False)
            every = np.arange(len(row.w))
            scores = reference.scores(of_blocks, of_blocks.k, every)
            error = score_error(of_blocks, every, None, UNIT["auto"] * BLOCK)
            between = np.sort(scores[1:-1])[::-1]
            if len(between) <= 3 or between[2] - between[3] > 2 * error.max():
                far_blocks += 1
                selected = np.unique(indices[t][indices[t] >= 0] // BLOCK)
                assert np.array_equal(kept[t][kept[t] >= 0], selected)
    assert far_heads > 10 and far_blocks > 10


@backends
def test_ties_and_nan(backend: str) -> None:
    """Equal heads and blocks go to the lower one, NaN is below every number, and one query's NaN
    stays its own."""
    q, w = np.ones((3, 4, 64), np.float32), np.ones((3, 4), np.float32)
    means = np.ones((20, 64), np.float32)
    means[15] = np.nan
    rows = {"starts": np.array([0, 10, 0], np.int32), "ends": np.array([10, 20, 9], np.int32)}
    call = {"q": q, "w": w, "means": means, **rows, "backend": backend}
    heads = misa.route_from_means(**call, heads=2)
    assert np.array_equal(heads, [[0, 1]] * 3)
    kept = misa.keep_blocks_from_means(**call, filter_blocks=9)
    assert np.array_equal(kept[0], [0, 1, 2, 3, 4, 5, 6, 7, 9])
    assert np.array_equal(kept[1], [0, 1, 2, 3, 4, 6, 7, 8, 9])
    assert np.array_equal(kept[2], np.arange(9))
    w[1, 0] = np.nan
    heads = misa.route_from_means(**{**call, "means": np.abs(np.nan_to_num(means))}, heads=2)
    assert np.array_equal(heads, [[0, 1], [1, 2], [0, 1]])


@backends
def test_partial_blocks(backend: str) -> None:
    """A partial block counts as the last one, whichever row it is and whether or not whole ones
    come before it; the array of them may be left out."""
    rng = np.random.default_rng(3)
    q, w = rng.standard_normal((4, 8, 64), np.float32), rng.standard_normal((4, 8), np.float32)
    means = rng.standard_normal((30, 64), np.float32)
    starts, ends = np.array([[4, 4, 9, 0], [12, 12, 9, 0]], np.int32)
    call = {"q": q, "w": w, "means": means, "backend": backend}
    partial = np.array([-1, 2, 17, -1], np.int32)
    heads = misa.route_from_means(**call, starts=starts, ends=ends, partial=partial, heads=3)
    kept = misa.keep_blocks_from_means(
        **call, starts=starts, ends=ends, partial=partial, filter_blocks=4
    )
    # The same blocks as whole ones, one after the other.
    rows = [list(range(4, 12)), [*range(4, 12), 2], [17], []]
    laid_out = np.array(sum(rows, []))
    stops = np.cumsum([len(each) for each in rows]).astype(np.int32)
    begins = stops - [len(each) for each in rows]
    whole = {**call, "means": means[laid_out], "starts": begins.astype(np.int32), "ends": stops}
    assert np.array_equal(heads, misa.route_from_means(**whole, heads=3))
    assert np.array_equal(kept, misa.keep_blocks_from_means(**whole, filter_blocks=4))
    assert kept[1][3] == 8 and kept[2].tolist() == [0, -1, -1, -1]
    assert (heads[3] == -1).all() and (kept[3] == -1).all()


def test_threads_and_neighbours_change_nothing() -> None:
    given = given_means(random_inputs(PACK, dtype="bf16"))
    heads = misa.route_from_means(**given, heads=3)
    kept = misa.keep_blocks_from_means(**given, filter_blocks=4)
    assert np.array_equal(misa.route_from_means(**given, heads=3, threads=3), heads)
    for t in range(len(PACK)):
        one = {name: a if name == "means" else a[t : t + 1] for name, a in given.items()}
        assert np.array_equal(misa.route_from_means(**one, heads=3)[0], heads[t])
        assert np.array_equal(misa.keep_blocks_from_means(**one, filter_blocks=4)[0], kept[t])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("means", lambda a: a[:, :32], r"means: expected D = 64 as q has, got 32"),
        ("starts", lambda a: a - 1, r"starts\[0\]: expected 0 to M = \d+, got -1"),
        ("ends", lambda a: a + 1000, r"ends\[0\]: expected 0 to M = \d+, got \d+"),
        ("ends", lambda a: a[1:], r"ends: expected 9 entries \(T\), got 8"),
        ("partial", lambda a: a[:0], r"partial: expected 9 entries \(T\), got 0"),
        ("partial", lambda a: a - 1, r"partial\[\d\]: expected -1 \(none\) to M - 1 = \d+, got -2"),
        ("w", lambda a: a[1:], r"w: expected T = 9 as q has, got 8"),
    ],
)
def test_refuses(name: str, change, message: str) -> None:
    given = given_means(random_inputs(PACK))
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        misa.route_from_means(**given, heads=3)
    with pytest.raises(ValueError, match=message):
        misa.keep_blocks_from_means(**given, filter_blocks=3)


def test_unknown_backend() -> None:
    given = given_means(random_inputs(PACK))
    with pytest.raises(RuntimeError, match="backend: expected auto, .*, got 'tpu'"):
        misa.route_from_means(**given, heads=3, backend="tpu")
