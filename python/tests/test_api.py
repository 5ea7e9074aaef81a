# SPDX-License-Identifier: Apache-2.0
"""The Python interface: arrays in and out, errors, plans, caches, comparison."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import misa
from inputs import PACK, random_inputs

CONFIG = misa.Config("misa-r", top_k=16, heads=2)
POISON = -77


def expect(message: str, call: Any, **arguments: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_names() -> None:
    assert misa.indexer_names()[:5] == ["dsa", "misa", "misa-dagger", "misa-r", "hisa"]
    assert "pooled" in misa.router_names()
    assert misa.__version__ == misa.version()
    names = [backend.name for backend in misa.backends()]
    assert names[-1] == "reference" and misa.backends()[-1].available


@pytest.mark.parametrize("name", misa.indexer_names())
def test_config(name: str) -> None:
    config = misa.Config(name, top_k=100)
    assert (config.indexer, config.top_k) == (name, 100)
    assert config == misa.Config(name, top_k=100) and hash(config) == hash(
        misa.Config(name, top_k=100)
    )
    assert config != misa.Config(name, top_k=101)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(AttributeError):
        config.top_k = 1
    assert misa.Config(name, heads=np.int32(5)).heads == 5
    assert misa.Config(name, ordered=True).ordered


def test_config_defaults() -> None:
    config = misa.Config("misa-dagger")
    assert (config.router, config.heads, config.block, config.candidates) == (
        "pooled", 8, 1024, 8192
    )  # fmt: skip
    assert misa.Config("misa-r").sketch == 0
    assert misa.Config("misa-r", top_k=16, sketch=2).candidates == 8 * 16
    assert misa.Config("misa-dagger", top_k=16, sketch=4).candidates == 2 * 16
    assert misa.Config("misa-r", top_k=16, sketch=2, candidates=64).candidates == 64
    assert misa.Config("misa-r").residual and misa.Config("hisa").filter_block == 128
    assert misa.Config(router="static", heads=2, static_heads=[3, 1]).static_heads == (3, 1)


CHANGES = [{"indexer": "dsa"}, {"indexer": "misa-r", "heads": 3}, {"top_k": 512}, {"heads": 8}]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("given", [{}, {"heads": 5}, {"residual": True, "static_heads": [1, 2]}])
@pytest.mark.parametrize("name", misa.indexer_names())
def test_config_replace(name: str, given: dict, change: dict) -> None:
    """What was left out is left out again, however often a config was copied."""
    config = misa.Config(name, **given)
    want = misa.Config(**({"indexer": name} | given | change))
    for copied in (
        config,
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config),
        misa.Config(**dataclasses.asdict(config)),
    ):
        assert copied == config and hash(copied) == hash(config) and repr(copied) == repr(config)
        assert dataclasses.replace(copied, **change) == want
        assert misa.Config(**(dataclasses.asdict(copied) | change)) == want
        if hasattr(copy, "replace"):
            assert copy.replace(copied, **change) == want
    assert eval(repr(config), {"Config": misa.Config}) == config


def test_config_equals_by_value() -> None:
    """A default that was given is the default."""
    config = misa.Config("misa")
    given = misa.Config("misa", heads=config.heads)
    assert given == config and hash(given) == hash(config) and repr(given) == repr(config)
    with pytest.raises(TypeError, match="best"):
        dataclasses.replace(config, best=True)
    with pytest.raises(ValueError, match="heads: expected an integer"):
        dataclasses.replace(config, heads="8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"indexer": "best"}, "indexer: expected dsa, .*, got 'best'"),
        ({"indexer": None}, "indexer: expected a name, got None"),
        ({"router": "best"}, "router: expected all, .*, got 'best'"),
        ({"heads": 1.5}, "heads: expected an integer, got 1.5"),
        ({"sketch": "2"}, "sketch: expected an integer, got '2'"),
        ({"top_k": 2**40}, "top_k: expected an integer of 32 bits"),
        ({"ordered": 1}, "ordered: expected True or False, got 1"),
        ({"static_heads": "12"}, "static_heads: expected a list"),
        ({"static_heads": [1, "x"]}, r"static_heads\[1\]: expected an integer"),
    ],
)
def test_config_refuses(fields: dict, message: str) -> None:
    expect(message, misa.Config, **fields)


@pytest.mark.parametrize(
    ("dtype", "fields", "message"),
    [
        ("e4m3", {"sketch": 3, "candidates": 32}, "sketch: expected 0 .none., 2 or 4, got 3"),
        (
            "bf16",
            {"sketch": 2, "candidates": 32},
            "sketch: expected 0 .none. with bf16 keys, got 2",
        ),
        (
            "e4m3",
            {"sketch": 4, "candidates": 0},
            "candidates: expected at least top_k = 16 with a sketch",
        ),
        (
            "e4m3",
            {"sketch": 4, "candidates": 15},
            "candidates: expected 0 .no re-rank. or at least",
        ),
    ],
)
def test_sketch_refuses(dtype: str, fields: dict, message: str) -> None:
    config = misa.Config("misa-r", top_k=16, heads=2, **fields)
    expect(message, misa.select, **random_inputs(PACK, dtype=dtype).arguments(), config=config)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])
def test_strides(dtype: str) -> None:
    """Padded tokens and heads are read where they lie."""
    inputs = random_inputs(PACK, dtype=dtype)
    want = misa.select(**inputs.arguments(), config=CONFIG)
    (tokens, heads, dim), keys = inputs.q.shape, len(inputs.k)
    q = np.full((tokens, heads + 1, dim + 16), np.nan, inputs.q.dtype)
    w = np.full((tokens, heads + 3), np.nan, np.float32)
    k = np.full((keys, dim + 32), np.nan, inputs.k.dtype)
    q[:, :heads, :dim], w[:, :heads], k[:, :dim] = inputs.q, inputs.w, inputs.k
    inputs.q, inputs.w, inputs.k = q[:, :heads, :dim], w[:, :heads], k[:, :dim]
    got = misa.select(**inputs.arguments(), config=CONFIG)
    assert np.array_equal(got.indices, want.indices)


@pytest.mark.parametrize("dtype", ["bf16", "e4m3"])
def test_bits(dtype: str) -> None:
    """Bits in unsigned integers are the values they stand for."""
    inputs = random_inputs(PACK, dtype=dtype)
    want = misa.select(**inputs.arguments(), config=CONFIG, scores=True)
    raw = np.uint16 if dtype == "bf16" else np.uint8
    inputs.q, inputs.k = inputs.q.view(raw), inputs.k.view(raw)
    got = misa.select(**inputs.arguments(), config=CONFIG, scores=True)
    assert np.array_equal(got.indices, want.indices)
    assert np.array_equal(got.scores, want.scores)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])
def test_jax(dtype: str) -> None:
    """Arrays of JAX in host memory give what NumPy's give, as arrays of JAX."""
    jax = pytest.importorskip("jax")
    inputs = random_inputs(PACK, dtype=dtype)
    want = misa.select(**inputs.arguments(), config=CONFIG, scores=True)
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = {
            name: None if array is None else jax.numpy.asarray(array)
            for name, array in inputs.arguments().items()
        }
        got = misa.select(**arrays, config=CONFIG, scores=True)
    assert isinstance(got.indices, jax.Array) and got.heads is None
    assert np.array_equal(got.indices, want.indices)
    assert np.array_equal(got.scores, want.scores)


def test_optional_outputs() -> None:
    inputs = random_inputs(PACK)
    got = misa.select(**inputs.arguments(), config=CONFIG)
    assert got.indices.dtype == np.int32 and got.indices.shape == (4, 16)
    assert got.scores is None and got.heads is None and got.residual is None
    got = misa.select(**inputs.arguments(), config=CONFIG, scores=True, heads=True, residual=True)
    assert got.scores.shape == (4, 16) and got.scores.dtype == np.float32
    assert got.heads.shape == (4, 2) and got.residual.shape == (4, 64)
    dense = misa.Config("dsa", top_k=16)
    got = misa.select(**inputs.arguments(), config=dense, heads=True, residual=True)
    assert got.heads is None and got.residual is None


def test_no_queries() -> None:
    inputs = random_inputs([], keys=10)
    assert misa.select(**inputs.arguments(), config=CONFIG).indices.shape == (0, 16)
    inputs = random_inputs([(0, 0), (0, 0)], keys=0)
    assert np.all(misa.select(**inputs.arguments(), config=CONFIG).indices == -1)


def test_read_only_inputs() -> None:
    inputs = random_inputs(PACK)
    for array in (inputs.q, inputs.w, inputs.k, inputs.ks, inputs.ke):
        array.flags.writeable = False
    assert misa.select(**inputs.arguments(), config=CONFIG).indices.shape == (4, 16)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q.astype(np.float64), "q: expected float32, .*, got float64"),
        ("q", lambda q: q.astype(np.int8), "q: expected float32, .*, got int8"),
        ("q", lambda q: q[0], r"q: expected \[T, H, D\], got 2 dimensions"),
        ("q", lambda q: q[:, :, ::2], "q: expected a contiguous last dimension, got a stride of 2"),
        ("q", lambda q: np.broadcast_to(q[:1], q.shape), "q: expected a stride above 0"),
        ("q", lambda q: q[::-1], "q: expected a stride above 0 in dimension 0"),
        ("q", lambda q: q.tolist(), "q: expected an array, got list"),
        ("q", lambda q: q[:, :, :32], "q: expected D = 64 or 128, got 32"),
        ("w", lambda w: w[:, :5], "w: expected H = 8 as q has, got 5"),
        ("w", lambda w: w.astype(np.float16), "w: expected float32, got float16"),
        ("w", lambda w: None, "w: expected an array of float32 .*, got NoneType"),
        ("k", lambda k: np.concatenate([k, k], 1), "k: expected D = 64 as q has, got 128"),
        ("ks", lambda ks: ks.astype(np.int64), "ks: expected int32, got int64"),
        ("ks", lambda ks: ks[:2], r"ks: expected 4 entries \(T\), got 2"),
        ("ks", lambda ks: ks - 1, r"ks\[0\]: expected 0 to L = 400, got -1"),
        ("ke", lambda ke: ke + 1, r"ke\[2\]: expected 0 to L = 400, got 401"),
        ("ke", lambda ke: np.repeat(ke, 2)[::2], "ke: expected a contiguous last dimension"),
        ("k_scale", lambda _: np.ones(400, np.float32), "k_scale: expected none with f32 keys"),
        ("k_scale", lambda _: np.ones(3, np.float32), "k_scale: expected L = 400 entries"),
        ("k", lambda k: k.astype(ml_dtypes.float8_e4m3fn), "k_scale: expected float32"),
    ],
)
def test_refuses(name: str, change: Any, message: str) -> None:
    arguments = random_inputs(PACK).arguments()
    arguments[name] = change(arguments[name])
    expect(message, misa.select, **arguments, config=CONFIG)


def test_refuses_options() -> None:
    arguments = random_inputs(PACK).arguments()
    expect("heads: expected 0 to H = 8, got 9", misa.select, **arguments,
           config=misa.Config("misa-r", heads=9))  # fmt: skip
    expect(
        "top_k: expected 1 or more, got 0", misa.select, **arguments, config=misa.Config(top_k=0)
    )
    expect("config: expected a misa.Config", misa.select, **arguments, config="misa")
    expect("threads: expected 0", misa.select, **arguments, config=CONFIG, threads=-1)
    expect("threads: expected an integer, got 1.5", misa.select, **arguments, threads=1.5)
    expect("workspace_cap: expected an integer of 64 bits", misa.select, **arguments,
           workspace_cap=1 << 64)  # fmt: skip
    expect("backend: expected a name, got 3", misa.select, **arguments, backend=3)
    expect("workspace_cap: expected 0", misa.select, **arguments, config=CONFIG, workspace_cap=-1)
    with pytest.raises(MemoryError, match="workspace"):
        misa.select(**arguments, config=CONFIG, workspace_cap=1)
    with pytest.raises(RuntimeError, match="backend: expected"):
        misa.select(**arguments, config=CONFIG, backend="abacus")


def test_plan() -> None:
    """A plan writes every element of the outputs it is given, and nothing else."""
    inputs = random_inputs(PACK)
    want = misa.select(
        **inputs.arguments(), config=CONFIG, scores=True, heads=True, residual=True, backend="cpu"
    )
    plan = misa.Plan(CONFIG, tokens=10, heads=8, dim=64, max_keys=400, q_dtype=np.float32,
                     k_dtype="f32", backend="cpu")  # fmt: skip
    assert plan.backend in [backend.name for backend in misa.backends()]
    arguments = inputs.arguments()
    del arguments["k_scale"]
    assert np.array_equal(plan.run(**arguments).indices, want.indices)
    whole = np.full(plan.workspace_bytes + 64, 0xA5, np.uint8)
    first = -whole.ctypes.data % 64
    for workspace in (None, whole[first : first + plan.workspace_bytes]):
        out = misa.Selected(*(np.full_like(array, POISON) for array in want))
        assert plan.run(**arguments, out=out, workspace=workspace) is out
        for got, expected in zip(out, want, strict=True):
            assert np.array_equal(got, expected)
    with pytest.raises(MemoryError, match="workspace: expected"):
        plan.run(**arguments, workspace=whole[first : first + 64])
    expect("workspace: expected data aligned", plan.run, **arguments, workspace=whole[first + 1 :])
    expect("indices: expected int32, got float32", plan.run, **arguments,
           out=misa.Selected(want.scores))  # fmt: skip
    expect("indices: expected 4 \\* 16 elements", plan.run, **arguments,
           out=misa.Selected(want.indices[:2]))  # fmt: skip
    expect("indices: expected a contiguous last dimension", plan.run, **arguments,
           out=misa.Selected(np.empty((4, 32), np.int32)[:, ::2]))  # fmt: skip
    frozen = np.empty_like(want.indices)
    frozen.flags.writeable = False
    expect("indices: expected a writable array", plan.run, **arguments, out=misa.Selected(frozen))


def strided(array: np.ndarray, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for an array like this one that lie in a wider array, and that wider array."""
    rows, columns = array.shape
    whole = np.full((rows, columns + padding), POISON, array.dtype)
    return whole[:, :columns], whole


def test_output_forms() -> None:
    """Rows with strides, offsets and slots: in calls, in plans, and with given outputs."""
    inputs = random_inputs(PACK).arguments()
    want = misa.select(**inputs, config=CONFIG, scores=True)
    flat = np.where(want.indices >= 0, want.indices + inputs["ks"][:, None], -1)
    got = misa.select(**inputs, config=CONFIG, offsets=inputs["ks"])
    assert np.array_equal(got.indices, flat) and got.scores is None
    plan = misa.Plan(CONFIG, tokens=4, heads=8, dim=64, max_keys=400, q_dtype="f32", k_dtype="f32")
    for call in (lambda **a: misa.select(**inputs, config=CONFIG, **a),
                 lambda **a: plan.run(**inputs, **a)):  # fmt: skip
        (indices, whole), (scores, score_whole) = strided(flat, 7), strided(want.scores, 3)
        out = misa.Selected(indices, scores)
        assert call(out=out, offsets=inputs["ks"]) is out
        assert np.array_equal(indices, flat) and np.array_equal(scores, want.scores)
        assert (whole[:, 16:] == POISON).all() and (score_whole[:, 16:] == POISON).all()
        expect("out: expected a misa.Selected, got tuple", call, out=(indices,))
        expect("offsets: expected 4 entries", call, offsets=inputs["ks"][:3])
        expect("offsets: expected int32, got int64", call, offsets=inputs["ks"].astype(np.int64))
    expect("stream: expected none", plan.run, **inputs, stream=0)

    cache = filled_cache()
    table = np.array([[3, 0, 5], [1, 4, 2]], np.int32)
    lengths = np.array([150, 9], np.int32)
    paged = {"q": inputs["q"], "w": inputs["w"], "cache": cache.data, "block_table": table,
             "context_lens": lengths, "next_n": 2}  # fmt: skip
    want = misa.select_paged(**paged, config=CONFIG)
    of_row = table[np.arange(4) // 2]
    pages = np.take_along_axis(of_row, np.maximum(want.indices, 0) // 64, 1)
    slots = np.where(want.indices >= 0, pages * 64 + want.indices % 64, -1)
    plan = misa.Plan(CONFIG, tokens=4, heads=8, dim=64, max_keys=150, q_dtype="f32", k_dtype="e4m3",
                     batch=2)  # fmt: skip
    assert np.array_equal(plan.run_paged(**paged).indices, want.indices)
    for call in (lambda **a: misa.select_paged(**paged, config=CONFIG, **a),
                 lambda **a: plan.run_paged(**paged, **a)):  # fmt: skip
        assert np.array_equal(call(slots=True).indices, slots)
        moved = np.where(want.indices >= 0, want.indices + 10, -1)
        ten = np.full(4, 10, np.int32)
        assert np.array_equal(call(offsets=ten).indices, moved)
        indices, whole = strided(slots, 2)
        out = misa.Selected(indices)
        assert call(out=out, slots=True) is out
        assert np.array_equal(indices, slots) and (whole[:, 16:] == POISON).all()
        expect("slots: expected True or False", call, slots=1)
        expect("offsets: expected none with slots", call, slots=True, offsets=ten)


def test_plan_refuses() -> None:
    shape = {"tokens": 2, "heads": 8, "dim": 64, "max_keys": 100}
    f32 = {"q_dtype": "f32", "k_dtype": "f32"}
    expect("q_dtype: expected float32", misa.Plan, config=CONFIG, **shape, q_dtype=np.float64,
           k_dtype="f32")  # fmt: skip
    expect("tokens: expected an integer, got '2'", misa.Plan, config=CONFIG, **f32,
           **shape | {"tokens": "2"})  # fmt: skip
    expect("device: expected cpu", misa.Plan, config=CONFIG, **shape, **f32, device="tpu")
    expect("device: expected cpu", misa.Plan, config=CONFIG, **shape, **f32, device="cuda:x")
    expect("device: expected an integer of 32 bits", misa.Plan, config=CONFIG, **shape, **f32,
           device=f"cuda:{1 << 40}")  # fmt: skip
    with pytest.raises(RuntimeError, match="^device: (expected one of|this build)"):
        misa.Plan(CONFIG, **shape, **f32, device="cuda:4096")
    plan = misa.Plan(CONFIG, **shape, **f32)
    expect("out: expected a misa.Selected, got ndarray", plan.run,
           **random_inputs([(0, 9)]).arguments(), out=np.empty((1, 16), np.int32))  # fmt: skip
    arguments = random_inputs([(0, 101)]).arguments()
    expect("k: expected 100 keys a query at most, as planned, got 101", plan.run, **arguments)
    arguments = random_inputs([(0, 9)] * 3).arguments()
    expect("q: expected T = 2 at most, as planned, got 3", plan.run, **arguments)
    plan = misa.Plan(CONFIG, **shape, q_dtype=ml_dtypes.bfloat16, k_dtype=np.dtype(np.float32))
    expect("q: expected bf16 as planned, got f32", plan.run, **random_inputs([(0, 9)]).arguments())


def filled_cache(pages: int = 6, scale_format: str = "f32") -> misa.Cache:
    keys = np.random.default_rng(0).standard_normal((pages * 64, 64)).astype(np.float32)
    cache = misa.Cache(pages, 64, scale_format=scale_format)
    cache.append(keys, np.arange(len(keys)))
    return cache


def test_cache() -> None:
    """Scales as the format says, keys near what was appended, sums in their one order."""
    keys = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    for scale_format in ("f32", "ue8m0"):
        cache = misa.Cache(3, 64, scale_format=scale_format)
        slots = np.arange(100, dtype=np.int64)
        slots[50] = -1
        cache.append(keys, slots)
        flat = cache.data.reshape(3, -1)
        scale = flat[:, 64 * 64 :].copy().view(np.float32).reshape(-1)[:100]
        least = np.abs(keys).max(1) / np.float32(448)
        want = least if scale_format == "f32" else np.exp2(np.ceil(np.log2(least)))
        written = np.delete(np.arange(100), 50)
        assert np.array_equal(scale[written], want[written].astype(np.float32))
        assert scale[50] == 0
        elements = flat[:, : 64 * 64].reshape(-1, 64)[:100].view(ml_dtypes.float8_e4m3fn)
        held = elements.astype(np.float32) * scale[:, None]
        # An e4m3 value has 4 bits: half of the last is 2^-4 of it, or 2^-10 where it is subnormal.
        off = np.abs(held - keys)[written]
        bound = np.maximum(np.abs(keys) * 2.0**-4, scale[:, None] * 2.0**-10)[written]
        assert np.all(off <= bound * (1 + 2.0**-20))
        total = np.zeros((2, 64), np.float32)
        for i, key in enumerate(held):
            total[i // 64] += key
        assert np.array_equal(cache.page_sums[:2, 0], total)
        largest = np.stack([scale[:64].max(), scale[64:].max()])
        assert np.array_equal(cache.largest_scales[:2, 0], largest)
        assert np.all(cache.page_sums[2] == 0)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_sketches_beside_a_cache(bits: int, page_size: int) -> None:
    dim, pages = 64, 3
    code, scale = (dim // 4, 2) if bits == 2 else (dim // 2, dim // 32)
    cache = misa.Cache(pages, dim, page_size=page_size)
    sketches = np.full((pages, page_size * (code + scale)), 0x5A, np.uint8)
    keys = np.random.default_rng(3).normal(size=(5, dim)).astype(np.float32)
    slots = np.array([0, 7, page_size, page_size + 31, 3 * page_size - 1])
    misa.append(cache.data, keys, slots, sketches=sketches)
    want = np.full_like(sketches, 0x5A)

    def expect_sketches(slots: np.ndarray) -> None:
        for slot in slots:
            page, token = divmod(int(slot), page_size)
            whole = cache.data[page].reshape(-1)
            key = whole[token * dim :][:dim].tobytes()
            factor = whole[page_size * dim :].view(np.float32)[token]
            codes, scales = misa._core.sketch_key(bits, key, float(factor))
            want[page, token * code :][:code] = np.frombuffer(codes, np.uint8)
            want[page, page_size * code + token * scale :][:scale] = np.frombuffer(scales, np.uint8)
        assert np.array_equal(sketches, want)

    expect_sketches(slots)
    filled = np.array([9], np.int32)
    misa.rebuild(cache.data, None, np.array([1], np.int32), filled, sketches=sketches)
    expect_sketches(page_size + np.arange(9))
    with pytest.raises(ValueError, match=r"^sketches: expected \[3, "):
        misa.append(cache.data, keys, slots, sketches=sketches[:, 1:])


def test_copy_pages() -> None:
    """Whole pages, with what is derived from them, and nothing else."""
    cache = filled_cache()
    sketches = np.arange(6 * 64 * 18).astype(np.uint8).reshape(6, -1)
    derived = {"page_sums": cache.page_sums, "largest_scales": cache.largest_scales,
               "sketches": sketches}  # fmt: skip
    arrays = cache.data, *derived.values()
    before = [array.copy() for array in arrays]
    misa.copy_pages(cache.data, np.array([3, 3], np.int32), np.array([0, 5], np.int32), **derived)
    for array, held in zip(arrays, before, strict=True):
        assert np.array_equal(array, held[[3, 1, 2, 3, 4, 3]])

    def refuses(message: str, from_: list[int], to: list[int]) -> None:
        pages = np.array(from_, np.int32), np.array(to, np.int32)
        expect(message, lambda: misa.copy_pages(cache.data, *pages))

    refuses("to: expected 1 pages, one a page of from, got 2", [1], [2, 4])
    refuses(r"from\[0\]: expected .*, got 9", [9], [1])
    refuses(r"from\[0\]: expected a page that is not overwritten", [1], [1])


def test_rebuild() -> None:
    cache = filled_cache()
    want = cache.page_sums.copy()
    cache.page_sums[...] = POISON
    misa.rebuild(cache.data, cache.page_sums, np.array([1, 3], np.int32))
    assert np.array_equal(cache.page_sums[[1, 3]], want[[1, 3]])
    assert np.all(cache.page_sums[[0, 2, 4, 5]] == POISON)
    page, empty = np.array([2], np.int32), np.array([0], np.int32)
    misa.rebuild(cache.data, cache.page_sums, page, empty, largest_scales=cache.largest_scales)
    assert np.all(cache.page_sums[2] == 0) and cache.largest_scales[2] == 0


def test_paged_layouts() -> None:
    """Flat and padded pages are the same cache."""
    cache = filled_cache()
    rng = np.random.default_rng(4)
    q, w = rng.standard_normal((2, 8, 64), np.float32), rng.standard_normal((2, 8), np.float32)
    table, lengths = np.array([[3, 1, 0, 2], [4, 5, 0, 0]], np.int32), np.array([250, 70], np.int32)
    want = cache.select(q, w, table, lengths, config=CONFIG).indices
    padded = np.full((6, 64 * 68 + 32), 0x7F, np.uint8)
    padded[:, : 64 * 68] = cache.data.reshape(6, -1)
    wide = np.full((2, 9), 99, np.int32)
    wide[:, :4] = table
    for data in (cache.data, cache.data.reshape(6, -1), padded[:, : 64 * 68]):
        got = misa.select_paged(q, w, data, wide[:, :4], lengths, config=CONFIG)
        assert np.array_equal(got.indices, want)


@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_page_sizes(page_size: int) -> None:
    """Pages of every size, with their derived data in arrays or in their tails, flat and shaped,
    select what pages of 64 do."""
    rng = np.random.default_rng(5)
    keys = rng.standard_normal((512, 64)).astype(np.float32)
    q, w = rng.standard_normal((4, 8, 64), np.float32), rng.standard_normal((4, 8), np.float32)
    lengths, table = np.array([250, 70], np.int32), np.array([[3, 1], [2, 0]], np.int32)
    config = misa.Config("misa", top_k=16, heads=2, block=64)

    def pages_of(size: int) -> np.ndarray:
        """The block table, whose entries are stretches of 128 tokens, in pages of this size."""
        each = 128 // size
        return (table[:, :, None] * each + np.arange(each)).reshape(2, -1).astype(np.int32)

    plain = misa.Cache(8, 64)
    plain.append(keys, np.arange(512))
    options = {"next_n": 2, "config": config, "scores": True}
    want = plain.select(q, w, pages_of(64), lengths, **options)

    cache = misa.Cache(512 // page_size, 64, page_size=page_size)
    cache.append(keys, np.arange(512))
    groups, tail = page_size // 64, misa.page_tail(64, page_size, 2)
    whole = np.full((512 // page_size, tail.page_stride), 0x7F, np.uint8)
    flat = whole[:, : page_size * 68]
    derived: dict[str, Any] = {}
    if groups:
        assert np.array_equal(cache.page_sums.reshape(8, 64), plain.page_sums.reshape(8, 64))
        assert np.array_equal(cache.largest_scales.reshape(8), plain.largest_scales.reshape(8))
        sums = whole[:, tail.page_sums :][:, : groups * 256].view(np.float32)
        largest = whole[:, tail.largest_scales :][:, : groups * 4].view(np.float32)
        derived = {"page_sums": sums.reshape(-1, groups, 64), "largest_scales": largest}
    else:
        assert cache.page_sums is None and cache.largest_scales is None
    misa.append(flat, keys, np.arange(512), **derived)
    assert np.array_equal(flat, cache.data.reshape(len(flat), -1))
    assert np.all(whole[:, tail.sketch :] == 0x7F)
    for name, array in derived.items():
        assert np.array_equal(array.reshape(8, -1), getattr(plain, name).reshape(8, -1))

    starts = np.array([0, 2, 4], np.int32)
    by_row = np.array([[249, 250], [69, 70]], np.int32)
    pages = pages_of(page_size)
    for got in (
        cache.select(q, w, pages, lengths, **options),
        misa.select_paged(q, w, flat, pages, lengths, **options, **derived),
        cache.select(q, w, pages, by_row, **options),
        cache.select(q, w, pages, lengths, query_starts=starts, **options | {"next_n": 1}),
    ):
        assert np.array_equal(got.indices, want.indices)
        assert np.array_equal(got.scores, want.scores)


def test_paged_refuses() -> None:
    cache = filled_cache()
    arguments = {
        "q": np.zeros((2, 8, 64), np.float32),
        "w": np.zeros((2, 8), np.float32),
        "cache": cache.data,
        "block_table": np.zeros((2, 4), np.int32),
        "context_lens": np.array([200, 1], np.int32),
        "config": CONFIG,
    }

    def refuses(message: str, **changes: Any) -> None:
        expect(message, misa.select_paged, **(arguments | changes))

    refuses("cache: expected uint8, got int8", cache=cache.data.view(np.int8))
    refuses("cache: expected a page size of 32, 64 or 128, got 48", cache=cache.data[:, :48])
    refuses("cache: expected pages that are dense inside",
            cache=np.zeros((6, 64, 136), np.uint8)[:, :, :68])  # fmt: skip
    refuses("cache: expected pages of page_size", cache=np.zeros((6, 64 * 68 + 4), np.uint8))
    refuses("cache: expected D = 64 as q has, got 128", cache=misa.Cache(6, 128).data)
    refuses("block_table: expected B = 2 rows", block_table=np.zeros((1, 4), np.int32))
    refuses(r"block_table\[0, 0\]: expected a page from 0 to 5, got 6",
            block_table=np.full((2, 4), 6, np.int32))  # fmt: skip
    refuses(r"context_lens\[0\]: expected at most", context_lens=np.array([300, 1], np.int32))
    refuses("q: expected T = batch \\* next_n", next_n=2)
    sums, largest = cache.page_sums, cache.largest_scales
    refuses(r"page_sums: expected \[6, 1, 64\], .* got \[5, 1, 64\]", page_sums=sums[:5])
    refuses("page_sums: expected .*, got 2 dimensions", page_sums=sums[:, 0])
    refuses("page_sums: expected none for pages of 32 tokens", page_sums=sums,
            cache=cache.data.reshape(12, 32, 68))  # fmt: skip
    refuses("largest_scales: expected none without page_sums", largest_scales=largest)
    refuses(r"largest_scales: expected \[6, 1\], got \[5, 1\]", page_sums=sums,
            largest_scales=largest[:5])  # fmt: skip
    refuses(r"context_lens: expected \[B\] or \[B, next_n = 1\], got \[2, 2\]",
            context_lens=np.zeros((2, 2), np.int32))  # fmt: skip
    refuses("context_lens: expected a contiguous array", next_n=2,
            context_lens=np.zeros((2, 3), np.int32)[:, :2])  # fmt: skip
    starts = np.arange(3, dtype=np.int32)
    refuses(r"context_lens: expected \[B\] or \[T = 2, 1\], got \[2, 2\]", query_starts=starts,
            context_lens=np.zeros((2, 2), np.int32))  # fmt: skip
    refuses(r"context_lens: expected \[B\] or \[T = 2, 1\], got \[3, 1\]", query_starts=starts,
            context_lens=np.zeros((3, 1), np.int32))  # fmt: skip
    refuses("query_starts: expected B . 1 = 3 entries, got 2",
            query_starts=np.arange(2, dtype=np.int32))  # fmt: skip
    refuses(r"query_starts\[2\]: expected T = 2, got 1",
            query_starts=np.array([0, 1, 1], np.int32))  # fmt: skip
    refuses("next_n: expected 1 with query_starts, got 2", next_n=2, query_starts=starts)
    refuses("next_n: expected 1 or more", next_n=0)


def test_append_refuses() -> None:
    cache = misa.Cache(2, 64)
    keys, slots = np.zeros((2, 64), np.float32), np.array([0, 1])
    frozen = cache.data.copy()
    frozen.flags.writeable = False
    expect("cache: expected a writable array", misa.append, cache=frozen, k=keys, slots=slots)
    expect(r"slots\[1\]: expected -1 to 127, got 128", cache.append, k=keys,
           slots=np.array([0, 128]))  # fmt: skip
    expect("slots: expected int64", cache.append, k=keys, slots=slots.astype(np.int32))
    expect("k: expected f32 or bf16", cache.append, k=keys.astype(ml_dtypes.float8_e4m3fn),
           slots=slots)  # fmt: skip
    expect("scale_format: expected f32 or ue8m0", misa.append, cache=cache.data, k=keys,
           slots=slots, scale_format="e5m2")  # fmt: skip
    expect("dim: expected 64 or 128", misa.Cache, pages=1, dim=96)
