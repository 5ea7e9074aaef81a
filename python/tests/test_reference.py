# SPDX-License-Identifier: Apache-2.0
"""The C++ backends against the specification in NumPy (misa/reference.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import misa
from inputs import (
    TINY,
    Inputs,
    check_set,
    dot_error,
    gamma,
    random_inputs,
    score_error,
    trace_inputs,
    traces,
)
from misa import reference
from misa.reference import Row

UNIT = {"reference": 2.0**-53, "auto": 2.0**-24}
"""The unit roundoff that a backend computes with."""
OUTPUT_UNIT = 2.0**-24
"""That of the float32 arrays that it writes."""

CONFIGS = [
    misa.Config("dsa", top_k=32),
    misa.Config("misa", top_k=32, heads=3, block=64),
    misa.Config("misa-dagger", top_k=32, heads=3, block=128, candidates=64),
    misa.Config("misa-r", top_k=32, heads=3),
    misa.Config("misa-r", top_k=32, heads=0),
    misa.Config("misa-r", top_k=32, heads=2, candidates=48),
    misa.Config("hisa", top_k=32, filter_block=64, filter_blocks=3),
    misa.Config("dsa", top_k=32, router="dispersion", heads=3),
    misa.Config("dsa", top_k=32, router="self", heads=3),
    misa.Config("dsa", top_k=32, router="qnorm", heads=3),
    misa.Config("dsa", top_k=32, router="weight", heads=3, residual=True),
    misa.Config("dsa", top_k=32, router="static", heads=2, static_heads=(5, 1)),
    misa.Config("hisa", top_k=32, filter_block=64, filter_blocks=4, router="pooled", heads=2,
                block=64, residual=True, candidates=40),
    misa.Config("misa-r", top_k=32, heads=2, dense_work=2000),
]  # fmt: skip
SKETCHED = [
    misa.Config("misa-r", top_k=32, heads=3, candidates=64, sketch=2),
    misa.Config("misa-r", top_k=32, heads=7, candidates=64, sketch=4),
    misa.Config("misa-dagger", top_k=32, heads=3, block=128, candidates=64, sketch=2),
    misa.Config("misa-dagger", top_k=32, heads=3, block=128, candidates=64, sketch=4),
    misa.Config("dsa", top_k=32, candidates=64, sketch=2),
    misa.Config("dsa", top_k=32, candidates=48, sketch=4),
    misa.Config("hisa", top_k=32, filter_block=64, filter_blocks=4, router="pooled", heads=2,
                block=64, residual=True, candidates=40, sketch=2),
    misa.Config("misa-r", top_k=32, heads=8, candidates=64, sketch=2),
    misa.Config("misa-r", top_k=32, heads=2, candidates=64, sketch=4, dense_work=2000),
]  # fmt: skip
"""For e4m3 keys."""
backends = pytest.mark.parametrize("backend", list(UNIT))
configs = pytest.mark.parametrize("config", CONFIGS, ids=repr)


def head_error(row: Row, config: misa.Config, unit: float) -> np.ndarray:
    """[H]: what head_values may be off by (docs/numerics.md, tests/support/tolerance.hpp)."""
    w, (_, dim) = np.abs(row.w), row.q.shape
    if config.router == "pooled":
        blocks = [row.k[i : i + config.block] for i in range(0, len(row.k), config.block)]
        means = np.stack([block.mean(0) for block in blocks])
        magnitudes = np.stack([np.abs(block).mean(0) for block in blocks])
        extra = 64 + config.block // 64 + 4  # tokens of a page, pages, scale and division
        x = dot_error(row.q, magnitudes, unit, extra) + TINY * config.block
        terms = np.abs(means @ row.q.T)
        return (w * (x + gamma(len(blocks) + 4, unit) * (terms + x))).mean(0)
    if config.router == "self":
        x = dot_error(row.q, row.k[-1], unit)
        return w * (x + gamma(2, unit) * (np.abs(row.q @ row.k[-1]) + x))
    norm = np.linalg.norm(row.q, axis=1)
    if config.router == "qnorm":
        return gamma(dim + 4, unit) * norm + 2.0**-63 * dim
    if config.router == "weight":
        return np.zeros(len(w))
    # Fits: delta is the rms of what x is off by; a slope is then off by at most 6 delta / std(x),
    # what is left over by 8 delta, and a standard deviation of max(0, x) by 2 delta.
    sample = row.k[reference.sample_positions(len(row.k))]
    x = sample @ row.q.T
    largest = np.abs(x).max(0)
    delta = np.sqrt(np.square(dot_error(row.q, sample, unit)).mean(0))
    delta += gamma(len(sample) + 8, unit) * largest + 2.0**-63
    spread = np.maximum(x.std(0), 1e-300)
    slope_error = np.where(8 * delta <= spread, 6 * delta / spread, 2)
    rms_error = np.where(8 * delta <= spread, 8, 27) * delta
    if config.router == "dispersion":
        return w * (2 * delta + gamma(4, unit) * reference.relu(x).std(0)) + TINY
    chance = reference.FIRE_CHANCE * norm * reference.rms(sample)
    chance_error = chance * gamma(sample.size + 2 * dim + 16, unit) + 2.0**-63 * dim * (1 + norm)
    error = rms_error + chance * slope_error + (1 + slope_error) * chance_error
    _, rest, _ = reference.sampled_fits(row)
    # The bound on FIRE_CHANCE covers its rounding to float32, whatever the backend computes with.
    return w * (error + gamma(8, OUTPUT_UNIT) * (rest + chance)) + TINY


def check_row(row: Row, config: misa.Config, got: misa.Selected, t: int, unit: float) -> None:
    """One row of a selection, a stage at a time: the heads by their values; then, given the heads
    and the residual row that were chosen, the positions by their scores, and the scores."""
    positions = got.indices[t][got.indices[t] >= 0]
    assert np.all(got.indices[t, len(positions) :] == -1)
    assert np.all(got.scores[t, len(positions) :] == -np.inf)
    n, every = len(row.k), np.arange(len(row.w))
    assert np.all(positions < n)
    routed = n > 0 and not reference.is_dense(row, config)
    heads, residual = every, None
    if config.router != "all":
        if not routed:
            assert np.all(got.heads[t] == -1)
        else:
            heads = got.heads[t]
            assert np.all(np.diff(heads) > 0)
            if config.router == "static":
                assert list(heads) == sorted(config.static_heads)
            else:
                exact = reference.head_values(row, config)
                error = head_error(row, config, unit)
                check_set(heads, exact, error, config.heads, f"heads of query {t}")
    if config.residual:
        residual = got.residual[t]
        if not routed:
            assert np.all(residual == 0)
            residual = None
    if n == 0:
        assert len(positions) == 0
        return

    of_heads = reference.scores(row, row.k, every)
    allowed = np.arange(n)
    if routed and config.filter_block:
        # Blocks whose scores are close may differ: what was chosen lies in few enough blocks.
        blocks = np.unique(positions // config.filter_block)
        assert len(blocks) <= config.filter_blocks
        allowed = reference.kept_positions(row, config)
    scored = row
    if routed and reference.is_sketched(row, config, len(allowed)):
        scored = reference.sketched(row, config.sketch)
    linear = None if residual is None else reference.rounded_residual(scored, residual)
    first = reference.routed_scores(scored, heads, residual) if routed else of_heads
    error = score_error(scored, heads, linear, unit)
    chosen = np.searchsorted(allowed, positions)
    assert np.array_equal(allowed[np.minimum(chosen, len(allowed) - 1)], positions)
    if routed and config.candidates:
        error_all = score_error(row, every, None, unit)
        best = reference.top_k(first[allowed], config.candidates)
        check_subset(chosen, first[allowed], error[allowed], config.candidates)
        exact = of_heads[positions]
        if not np.setdiff1d(chosen, best).size:
            place = np.searchsorted(best, chosen)
            again = allowed[best]
            check_set(place, of_heads[again], error_all[again], config.top_k, f"query {t}")
        error = error_all
    else:
        exact = first[positions]
        check_set(chosen, first[allowed], error[allowed], config.top_k, f"query {t}")
    written = got.scores[t, : len(positions)]
    off = np.abs(written - exact)
    bound = error[positions] + OUTPUT_UNIT * np.abs(exact) + TINY
    assert np.all(off <= bound), f"query {t}: scores are off by {off.max()}"


def check_subset(chosen: np.ndarray, exact: np.ndarray, error: np.ndarray, m: int) -> None:
    """That all chosen may be among the m best."""
    if len(exact) > m:
        least = np.sort(exact)[-m]
        assert np.all(exact[chosen] >= least - 2 * error.max())


def check(inputs: Inputs, config: misa.Config, backend: str) -> None:
    got = misa.select(**inputs.arguments(), config=config, backend=backend, scores=True, heads=True,
                      residual=True)  # fmt: skip
    for t, row in enumerate(reference.rows(**inputs.arguments())):
        check_row(row, config, got, t, UNIT[backend])


PACKS = {
    "one": [(0, 700)],
    "tiny": [(0, 1), (0, 2), (0, 31), (0, 32), (0, 33), (0, 64), (0, 65)],
    "empty": [(0, 0), (5, 5), (9, 3), (0, 200)],
    "ragged": [(0, 128), (0, 129), (129, 400), (129, 401), (401, 401), (401, 1000)],
}


@backends
@configs
@pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])
@pytest.mark.parametrize("pack", list(PACKS))
def test_random(pack: str, dtype: str, config: misa.Config, backend: str) -> None:
    check(random_inputs(PACKS[pack], dtype=dtype), config, backend)


@backends
@pytest.mark.parametrize("config", SKETCHED, ids=repr)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])
@pytest.mark.parametrize("dim", [64, 128])
def test_sketches(dim: int, dtype: str, config: misa.Config, backend: str) -> None:
    lengths = [(0, 0), (0, 20), (0, 65), (0, 300), (300, 371), (300, 900)]
    inputs = random_inputs(lengths, dim=dim, dtype="e4m3")
    inputs.q = random_inputs(lengths, dim=dim, dtype=dtype).q
    assert inputs.k_scale is not None
    inputs.k_scale[::7] *= -1
    inputs.k[310] = 0
    check(inputs, config, backend)


@pytest.mark.parametrize("scale", [1, -1, 0, 0.0123, -3e-5, 3e38, 1e-38, 1e-45, np.nan, np.inf])
@pytest.mark.parametrize("dim", [64, 128])
def test_sketch_bytes(dim: int, scale: float) -> None:
    """The bytes of sketches are those of the integers here."""
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 256, (60, dim)).astype(np.uint8)
    keys[(keys & 0x7F) == 0x7F] = 0
    keys[:20] &= 0x87  # subnormals
    keys[20:30] *= rng.integers(0, 8, (10, dim)) == 0
    keys[30], keys[31], keys[32] = 0, 0x38, 0x80
    keys[33, 5] = 0xFF
    for key in keys:
        element, scale32 = reference.values(key), np.float32(scale)
        with np.errstate(all="ignore"):
            codes, step = reference.rotated_codes(element, scale32)
            codes4, exponents = reference.mxfp4_codes(element, scale32)
        got_codes, got_step = misa._core.sketch_key(2, key.tobytes(), float(scale32))
        quads = (codes.reshape(-1, 4) << np.arange(0, 8, 2)).sum(1).astype(np.uint8)
        assert got_codes == quads.tobytes()
        assert got_step == (b"\xff\x7f" if np.isnan(step) else step.tobytes())
        got_codes, got_exponents = misa._core.sketch_key(4, key.tobytes(), float(scale32))
        pairs = (codes4.reshape(-1, 2) << [0, 4]).sum(1).astype(np.uint8)
        assert got_codes == pairs.tobytes()
        assert got_exponents == exponents.astype(np.uint8).tobytes()


# Those that fit no slopes, which no integers make exact.
EXACT = [
    config
    for config in CONFIGS
    if config.router not in ("nonlinearity", "dispersion") and not config.residual
]


@backends
@pytest.mark.parametrize("config", EXACT, ids=repr)
def test_ties(config: misa.Config, backend: str) -> None:
    """Small integers are exact in every order of addition, and scores are full of ties: the
    selection is the reference's to the position."""
    inputs = random_inputs([(0, 512), (0, 300), (300, 812)])
    rng = np.random.default_rng(1)
    for name in ("q", "w", "k"):
        array = vars(inputs)[name]
        array[...] = rng.integers(-1, 2, array.shape)
    inputs.k[:64] = 0
    inputs.k[100:200] = inputs.k[100]
    if config.router == "qnorm":
        inputs.q[..., 1:] = 0  # a root of a square is exact
    got = misa.select(**inputs.arguments(), config=config, backend=backend, heads=True)
    want = reference.select(reference.rows(**inputs.arguments()), config)
    assert np.array_equal(np.sort(got.indices, 1), np.sort(want.indices, 1))
    if want.heads is not None:
        assert np.array_equal(got.heads, want.heads)


@backends
@pytest.mark.parametrize("config", [misa.Config("dsa", top_k=32), misa.Config(top_k=32, heads=8)],
                         ids=repr)  # fmt: skip
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value: float, config: misa.Config, backend: str) -> None:
    """A key that is not finite ranks as its score does, NaN last, and a query that is not never
    reaches another one."""
    inputs = random_inputs([(0, 200), (0, 199), (0, 40)])
    clean = misa.select(**inputs.arguments(), config=config, backend=backend).indices
    inputs.q[1, 2, 3] = value
    beside = misa.select(**inputs.arguments(), config=config, backend=backend).indices
    assert np.array_equal(clean[[0, 2]], beside[[0, 2]])
    inputs.q[1, 2, 3] = 0
    inputs.k[17] = np.abs(inputs.k[17])
    inputs.k[17, 5] = value
    got = misa.select(**inputs.arguments(), config=config, backend=backend).indices
    rows = reference.rows(**inputs.arguments())
    want = reference.select(rows, config).indices
    for t, row in enumerate(rows):
        with np.errstate(invalid="ignore"):
            exact = reference.scores(row, row.k[17], np.arange(8))
        assert (17 in got[t]) == (17 in want[t]), f"query {t}, score {exact}"
        others = np.setxor1d(got[t], want[t])
        assert len(others) == 0, f"query {t}: {others}"


@backends
def test_only_nan(backend: str) -> None:
    inputs = random_inputs([(0, 100)])
    inputs.k[:] = np.nan
    config = misa.Config("dsa", top_k=32, ordered=True)
    got = misa.select(**inputs.arguments(), config=config, backend=backend)
    assert np.array_equal(got.indices[0], np.arange(32))


@backends
@pytest.mark.parametrize("indexer", ["dsa", "misa", "misa-dagger", "misa-r", "hisa"])
@pytest.mark.parametrize("path", list(traces()))
def test_traces(path: Path, indexer: str, backend: str) -> None:
    check(trace_inputs(path, 2), misa.Config(indexer, top_k=512), backend)


@backends
@pytest.mark.parametrize("config", CONFIGS + SKETCHED, ids=repr)
@pytest.mark.parametrize(("next_n", "page_size"), [(1, 64), (3, 64), (3, 32), (1, 128)])
def test_paged(next_n: int, page_size: int, config: misa.Config, backend: str) -> None:
    rng = np.random.default_rng(2)
    lengths = np.array([400, 2, 0, 64, -1], np.int32)
    cache = misa.Cache(40, 64, page_size=page_size)
    cache.data[...] = rng.integers(0, 256, cache.data.shape)  # what was there before is no key
    table = np.full((5, 14), 39, np.int32)
    table[0, :13], table[1, 0], table[3, :2] = rng.permutation(20)[:13], 30, (31, 33)
    for b, length in enumerate(lengths):
        position = np.arange(max(length, 0))
        keys = rng.standard_normal((len(position), 64)).astype(np.float32)
        cache.append(keys, table[b, position // page_size].astype(np.int64) * page_size
                     + position % page_size)  # fmt: skip
    q = rng.standard_normal((5 * next_n, 8, 64)).astype(np.float32)
    w = rng.standard_normal((5 * next_n, 8)).astype(np.float32)
    got = cache.select(q, w, table, lengths, next_n=next_n, config=config, backend=backend,
                       scores=True, heads=True, residual=True)  # fmt: skip
    rows = reference.paged_rows(q, w, cache.data, table, lengths, next_n)
    for t, row in enumerate(rows):
        check_row(row, config, got, t, UNIT[backend])
    assert np.array_equal(
        misa.select_paged(q, w, cache.data, table, lengths, next_n=next_n, config=config,
                          backend=backend).indices,
        got.indices,
    )  # fmt: skip


@backends
@configs
def test_paged_lengths(config: misa.Config, backend: str) -> None:
    """Lengths by row, in any order, and rows a sequence that differ."""
    rng = np.random.default_rng(6)
    cache = misa.Cache(8, 64)
    cache.append(rng.standard_normal((512, 64)).astype(np.float32), np.arange(512))
    q = rng.standard_normal((6, 8, 64)).astype(np.float32)
    w = rng.standard_normal((6, 8)).astype(np.float32)
    table = np.array([[7, 1, 2], [4, 0, 5], [3, 6, 0]], np.int32)
    for lengths, call in (
        (np.array([[130, 7], [0, 192], [-3, 64]], np.int32), {"next_n": 2}),
        (np.array([150, 9, 66], np.int32), {"query_starts": np.array([0, 4, 4, 6], np.int32)}),
        (
            np.array([[150], [7], [192], [-3], [64], [66]], np.int32),
            {"query_starts": np.array([0, 4, 4, 6], np.int32)},
        ),
    ):
        got = cache.select(q, w, table, lengths, config=config, backend=backend, scores=True,
                           heads=True, residual=True, **call)  # fmt: skip
        rows = reference.paged_rows(q, w, cache.data, table, lengths, **call)
        for t, row in enumerate(rows):
            check_row(row, config, got, t, UNIT[backend])


def test_e4m3_round_trip() -> None:
    finite = reference.E4M3[np.isfinite(reference.E4M3)]
    assert np.array_equal(reference.round_e4m3(finite), finite)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(3).uniform(-448, 448, 10000).astype(np.float32)
    x[:5000] *= 2.0**-12
    assert np.array_equal(
        reference.round_e4m3(x), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    )


@pytest.mark.parametrize("config", CONFIGS + SKETCHED, ids=str)
def test_recipe(config: misa.Config) -> None:
    """What the library takes a config to mean for a row is what this specification does."""
    random = np.random.default_rng(9)
    heads = 8
    for n in (1, 31, 32, 33, 64, 65, 128, 129, 192, 193, 250, 256, 257, 640):
        row = Row(random.normal(size=(heads, 4)), np.ones(heads), random.normal(size=(n, 4)), False)
        recipe = misa._core.recipe(config, heads, n)
        dense = reference.is_dense(row, config)
        assert recipe["dense"] == dense
        if dense:
            assert recipe["scored"] == n and recipe["heads"] == heads
            assert not any(recipe[part] for part in ("routed", "filtered", "active", "reranked"))
            continue
        kept = reference.kept_positions(row, config)
        assert recipe["scored"] == len(kept)
        assert recipe["filtered"] == (len(kept) < n)
        assert recipe["routed"] == (config.router != "all")
        assert recipe["sketched"] == reference.is_sketched(row, config, len(kept))
        samples = reference.sample_positions(n)
        assert misa._core.sample_stride(n) == (samples[1] if len(samples) > 1 else 1)
        # Another routing changes the selection only where the recipe says that heads are active.
        many = np.arange(heads)
        few = many if config.router == "all" else np.arange(config.heads)
        zero = np.zeros(4)
        residual = zero if config.residual else None
        first = reference.routed_scores(row, few, residual)
        if not recipe["active"] and config.router != "all" and len(few) < heads:
            assert config.candidates >= len(kept)  # all of them are re-ranked by all heads
        if recipe["reranked"]:
            assert recipe["keep"] == config.candidates < len(kept)
            assert recipe["sketched"] == (config.sketch > 0)
        else:
            assert recipe["keep"] == config.top_k
            if not recipe["active"]:
                chosen, found = reference.select_row(row, config, few, residual)
                every, best = reference.select_row(row, config, many, residual)
                assert np.array_equal(chosen, every) and np.array_equal(found, best)
        if recipe["active"] and not recipe["reranked"]:
            chosen, found = reference.select_row(row, config, few, residual)
            assert np.array_equal(found, first[chosen])
