# SPDX-License-Identifier: Apache-2.0
"""What is no argument of a call is refused by a message that names it, what was expected and what
came: every argument of every entry point, times every kind of object."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import misa
from inputs import random_inputs

CONFIG = misa.Config("misa-r", top_k=4, heads=2)
SHAPE = {"tokens": 2, "heads": 8, "dim": 64, "max_keys": 9}
OUTPUTS = misa.Selected._fields
CACHE = ("cache", "page_sums", "largest_scales", "sketches")
RUN = (*OUTPUTS, "workspace")
WRITTEN = {"append": CACHE, "rebuild": CACHE, "copy_pages": CACHE, "select into": OUTPUTS,
           "Plan.run": RUN, "Plan.run_paged": RUN}  # fmt: skip
OPTIONAL = ("k_scale", "query_starts", "page_sums", "largest_scales", "sketches", "filled",
            "partial", "offsets", *OUTPUTS, "workspace")  # fmt: skip
ELEMENTS = ("q", "k")

Call = tuple[Callable[..., Any], dict[str, Any]]


def run_plan(method: str, **arguments: Any) -> misa.Selected:
    plan = misa.Plan(CONFIG, **SHAPE, q_dtype="f32", k_dtype="e4m3", workspace_cap=1 << 20)
    out = misa.Selected(*(arguments.pop(name) for name in OUTPUTS))
    return getattr(plan, method)(**arguments, out=out)


def select_into(**arguments: Any) -> misa.Selected:
    out = misa.Selected(*(arguments.pop(name) for name in OUTPUTS))
    return misa.select(**arguments, config=CONFIG, out=out)


def calls() -> dict[str, Call]:
    """Every entry point that takes arrays, with arguments that it accepts."""
    given = random_inputs([(0, 9), (0, 5)], dtype="e4m3").arguments()
    given["q"] = given["q"].astype(np.float32)
    given["offsets"] = np.arange(2, dtype=np.int32)
    plan = misa.Plan(CONFIG, **SHAPE, q_dtype="f32", k_dtype="e4m3")
    whole = np.zeros(plan.workspace_bytes + 64, np.uint8)
    aligned = whole[-whole.ctypes.data % 64 :][: plan.workspace_bytes]
    out = misa.select(**given, config=CONFIG, scores=True, heads=True, residual=True)
    cache = misa.Cache(2, 64)
    keys, slots = np.ones((3, 64), np.float32), np.arange(3)
    queries = {name: given[name] for name in ("q", "w")}
    pages = {"block_table": np.zeros((2, 1), np.int32), "context_lens": np.full(2, 9, np.int32),
             "query_starts": np.arange(3, dtype=np.int32),
             "offsets": np.arange(2, dtype=np.int32)}  # fmt: skip
    rows = {"starts": np.zeros(2, np.int32), "ends": np.full(2, 3, np.int32)}
    means = {"means": np.ones((4, 64), np.float32), **rows, "partial": np.full(2, -1, np.int32)}
    held = {"cache": cache.data, "page_sums": cache.page_sums,
            "largest_scales": cache.largest_scales,
            "sketches": np.zeros((2, 64 * 18), np.uint8)}  # fmt: skip
    return {
        "select": (partial(misa.select, config=CONFIG), given),
        "select_paged": (partial(misa.select_paged, config=CONFIG), {**queries, **held, **pages}),
        "route_from_means": (partial(misa.route_from_means, heads=2), {**queries, **means}),
        "keep_blocks_from_means": (
            partial(misa.keep_blocks_from_means, filter_blocks=2),
            {**queries, **means},
        ),
        "append": (misa.append, {**held, "k": keys, "slots": slots}),
        "rebuild": (
            misa.rebuild,
            {**held, "pages": np.zeros(1, np.int32), "filled": np.ones(1, np.int32)},
        ),
        "copy_pages": (
            misa.copy_pages,
            {**held, "from_": np.zeros(1, np.int32), "to": np.ones(1, np.int32)},
        ),
        "select into": (select_into, {**given, **out._asdict()}),
        "Plan.run": (partial(run_plan, "run"), {**given, **out._asdict(), "workspace": aligned}),
        "Plan.run_paged": (
            partial(run_plan, "run_paged"),
            {**queries, **held, **pages, **out._asdict(), "workspace": aligned},
        ),
        "Cache.append": (cache.append, {"k": keys, "slots": slots}),
        "Cache.select": (partial(cache.select, config=CONFIG), {**queries, **pages}),
    }


def bits(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: np.zeros(array.shape, dtype)


def read_only(array: np.ndarray) -> np.ndarray:
    frozen = array.copy()
    frozen.flags.writeable = False
    return frozen


def big_endian(array: np.ndarray) -> np.ndarray:
    wide = array if array.dtype.itemsize > 1 else array.astype(np.float32)
    return wide.astype(wide.dtype.newbyteorder(">"))


KINDS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "none": (lambda _: None, "none|None|null|got 0"),
    "list": (lambda array: array.tolist(), "list"),
    "scalar": (lambda _: 3.0, "float"),
    "text": (lambda _: "array", "str"),
    "0-d": (lambda array: array.reshape(-1)[:1].reshape(()), "0 dimensions"),
    "deeper": (lambda array: np.zeros((1, 1, *array.shape), array.dtype), "dimensions"),
    "big-endian": (big_endian, "big-endian"),
    "masked": (np.ma.masked_array, "MaskedArray"),
    "read-only": (read_only, "read-only"),
    "object": (bits(object), "object"),
    "structured": (bits([("a", np.float32)]), "'a'"),
    "string": (bits("U3"), "<U3"),
    "date": (bits("M8[s]"), "datetime64"),
    "complex": (bits(np.complex64), "complex64"),
    "float16": (bits(np.float16), "float16"),
    "float64": (bits(np.float64), "float64"),
    "longdouble": (bits(np.longdouble), "float128|longdouble"),
    "bool": (bits(bool), "bool"),
    "int8": (bits(np.int8), "int8"),
    "uint64": (bits(np.uint64), "uint64"),
    "bf16": (bits(ml_dtypes.bfloat16), "bfloat16"),
    "e4m3": (bits(ml_dtypes.float8_e4m3fn), "float8_e4m3fn|e4m3"),
    "e5m2": (bits(ml_dtypes.float8_e5m2), "float8_e5m2"),
    "fnuz": (bits(ml_dtypes.float8_e4m3fnuz), "float8_e4m3fnuz"),
    "b11fnuz": (bits(ml_dtypes.float8_e4m3b11fnuz), "float8_e4m3b11fnuz"),
    "e8m0": (bits(ml_dtypes.float8_e8m0fnu), "float8_e8m0fnu"),
}


def wrong(entry: str, argument: str, kind: str) -> bool:
    """Whether an object of the kind is no such argument."""
    if kind == "none":
        return argument not in OPTIONAL and (argument, entry.split(".")[-1]) != ("k", "append")
    if kind == "read-only":
        return argument in WRITTEN.get(entry, ())
    if kind in ("0-d", "deeper"):  # these are elements in a row, of whatever shape
        return argument not in ("heads", "residual", "workspace")
    return argument not in ELEMENTS or kind not in ("bf16", "e4m3")


def cases(
    entries: Iterable[str], kinds: Iterable[str], wrong: Callable[[str, str, str], bool]
) -> list[pytest.ParameterSet]:
    everything = calls()
    return [
        pytest.param(entry, argument, kind, id=f"{entry}-{argument}-{kind}")
        for entry in entries
        for argument in everything[entry][1]
        for kind in kinds
        if wrong(entry, argument, kind)
    ]


def check_refused(call: Call, argument: str, value: Any, came: str) -> None:
    function, arguments = call
    with pytest.raises(ValueError, match=rf"^{argument}: expected (?s:.*), got (?s:.*)({came})"):
        function(**(arguments | {argument: value}))


@pytest.mark.parametrize(("entry", "argument", "kind"), cases(calls(), KINDS, wrong))
def test_refuses(entry: str, argument: str, kind: str) -> None:
    make, came = KINDS[kind]
    call = calls()[entry]
    check_refused(call, argument, make(call[1][argument]), came)


def test_accepts(tmp_path: Path) -> None:
    """What the table starts from, also read-only and mapped from a file."""
    for function, arguments in calls().values():
        function(**arguments)
    select, arguments = calls()["select"]
    want = select(**arguments).indices
    assert np.array_equal(select(**{n: read_only(a) for n, a in arguments.items()}).indices, want)
    np.save(tmp_path / "w.npy", arguments["w"])
    mapped = arguments | {"w": np.load(tmp_path / "w.npy", mmap_mode="r")}
    assert np.array_equal(select(**mapped).indices, want)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (misa.Cache, {"pages": "2"}),
        (misa.Cache, {"pages": -1}),
        (misa.Cache, {"pages": 2, "dim": 64.0}),
        (misa.Cache, {"pages": 2, "page_size": 48}),
        (misa.Cache, {"pages": 2, "page_size": "64"}),
        (misa.page_tail, {"dim": 96}),
        (misa.page_tail, {"dim": 64, "page_size": 16}),
        (misa.page_tail, {"dim": 64, "sketch_bits": -1}),
        (misa.page_tail, {"dim": 64, "sketch_bits": 1.5}),
        (misa.Cache, {"pages": 2, "scale_format": 8}),
        (misa.Cache, {"pages": 2, "scale_format": "e5m2"}),
        (partial(misa.Plan, CONFIG, **SHAPE, k_dtype="f32"), {"q_dtype": np.dtype(">f4")}),
        (partial(misa.Plan, CONFIG, **SHAPE, k_dtype="f32"), {"q_dtype": None}),
        (partial(misa.Plan, CONFIG, **SHAPE, q_dtype="f32"), {"k_dtype": np.dtype("float16")}),
        (partial(misa.Plan, CONFIG, **SHAPE, q_dtype="f32", k_dtype="f32"), {"device": "meta"}),
        (calls()["select"][0], {**calls()["select"][1], "scores": 1}),
        (calls()["select"][0], {**calls()["select"][1], "heads": None}),
        (calls()["select_paged"][0], {**calls()["select_paged"][1], "residual": "yes"}),
        (calls()["append"][0], {**calls()["append"][1], "scale_format": None}),
        (misa.route_from_means, {**calls()["route_from_means"][1], "heads": 2.5}),
        (misa.route_from_means, {**calls()["route_from_means"][1], "heads": 9}),
        (misa.route_from_means, {**calls()["route_from_means"][1], "heads": -1}),
        (misa.keep_blocks_from_means, {**calls()["route_from_means"][1], "filter_blocks": 1}),
        (misa.keep_blocks_from_means, {**calls()["route_from_means"][1], "filter_blocks": None}),
    ],
)
def test_refuses_options(call: Callable, argument: dict) -> None:
    *_, (name, came) = argument.items()
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got .*{re.escape(str(came))}"):
        call(**argument)


@pytest.mark.parametrize("argument", ["page_sums", "largest_scales"])
def test_cache_has_its_own_derived_data(argument: str) -> None:
    select, arguments = calls()["Cache.select"]
    with pytest.raises(ValueError, match=f"^{argument}: expected none, .*, got one"):
        select(**arguments, **{argument: calls()["select_paged"][1][argument]})


def test_says_what_holds_float16() -> None:
    hint = "got float16; float32 holds its values exactly$"
    call, arguments = calls()["select"]
    for argument in ("q", "w", "k", "k_scale"):
        given = arguments[argument].astype(np.float32).astype(np.float16)
        with pytest.raises(ValueError, match=f"^{argument}: expected .*float32.*, {hint}"):
            call(**(arguments | {argument: given}))
    with pytest.raises(ValueError, match=r"^ks: expected int32, got float16$"):
        call(**(arguments | {"ks": arguments["ks"].astype(np.float16)}))
    with pytest.raises(ValueError, match=f"^q_dtype: .*, {hint}"):
        misa.Plan(CONFIG, **SHAPE, q_dtype=np.dtype(np.float16), k_dtype="f32")


def test_refuses_other_frameworks() -> None:
    torch = pytest.importorskip("torch")
    entries = ("select", "select_paged", "route_from_means", "keep_blocks_from_means", "Plan.run")
    for entry in entries:
        call = calls()[entry]
        for argument, array in call[1].items():
            if argument not in ("q", *WRITTEN["Plan.run"]) and array.dtype.kind != "V":
                check_refused(call, argument, torch.from_numpy(array), "torch.Tensor")
