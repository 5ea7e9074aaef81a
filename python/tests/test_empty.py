# SPDX-License-Identifier: Apache-2.0
"""Arrays of no elements: a size of 0 in any dimension of any argument, whatever its strides say.

Strides of an array without elements lead nowhere. What a call does may depend on its sizes alone:
every layout gives the result, or the error, of the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import misa
from misa import deep_gemm

torch = pytest.importorskip("torch")

CONFIG = misa.Config("misa-r", top_k=4, heads=2, candidates=8)
T, H, D, L, PAGES, B, MAX_PAGES = 3, 4, 64, 70, 5, 3, 2


def _ones(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.ones(shape, dtype)


def _select() -> dict[str, np.ndarray]:
    return {
        "q": _ones(T, H, D),
        "w": _ones(T, H),
        "k": _ones(L, D, dtype="u1"),
        "ks": np.zeros(T, "i4"),
        "ke": np.full(T, 9, "i4"),
        "k_scale": _ones(L),
    }


def _select_paged(cache_of: tuple[int, ...] = (64, D + 4)) -> dict[str, np.ndarray]:
    return {
        "q": _ones(T, H, D),
        "w": _ones(T, H),
        "cache": np.zeros((PAGES, *cache_of), "u1"),
        "block_table": np.zeros((B, MAX_PAGES), "i4"),
        "context_lens": np.full(B, 9, "i4"),
        "page_sums": np.zeros((PAGES, 1, D), "f4"),
        "largest_scales": np.zeros((PAGES, 1), "f4"),
        "sketches": np.zeros((PAGES, 64 * (D // 4 + 2)), "u1"),
    }


def _means() -> dict[str, np.ndarray]:
    return {
        "q": _ones(T, H, D),
        "w": _ones(T, H),
        "means": _ones(L, D),
        "starts": np.zeros(T, "i4"),
        "ends": np.full(T, 9, "i4"),
        "partial": np.full(T, -1, "i4"),
    }


def _append() -> dict[str, np.ndarray]:
    return {
        "cache": np.zeros((PAGES, 64, D + 4), "u1"),
        "k": _ones(3, D),
        "slots": np.arange(3, dtype="i8"),
        "page_sums": np.zeros((PAGES, 1, D), "f4"),
        "largest_scales": np.zeros((PAGES, 1), "f4"),
        "sketches": np.zeros((PAGES, 64 * (D // 4 + 2)), "u1"),
    }


def _rebuild() -> dict[str, np.ndarray]:
    return {
        "cache": np.zeros((PAGES, 64, D + 4), "u1"),
        "page_sums": np.zeros((PAGES, 1, D), "f4"),
        "largest_scales": np.zeros((PAGES, 1), "f4"),
        "sketches": np.zeros((PAGES, 64 * (D // 4 + 2)), "u1"),
        "pages": np.arange(2, dtype="i4"),
        "filled": np.arange(2, dtype="i4"),
    }


def _copy_pages() -> dict[str, np.ndarray]:
    held = {name: array for name, array in _rebuild().items() if name not in ("pages", "filled")}
    return held | {"from_": np.arange(2, dtype="i4"), "to": np.arange(2, 4, dtype="i4")}


def _logits() -> dict[str, np.ndarray]:
    return {
        "q": _ones(T, H, D, dtype="u1"),
        "k": _ones(L, D, dtype="u1"),
        "k_scale": _ones(L),
        "weights": _ones(T, H),
        "starts": np.zeros(T, "i4"),
        "ends": np.full(T, 9, "i4"),
    }


def _run(**arguments: Any) -> misa.Selected:
    plan = misa.Plan(CONFIG, tokens=T, heads=H, dim=D, max_keys=L, q_dtype="f32", k_dtype="e4m3")
    return plan.run(**arguments)


def _fp8_mqa_logits(q: Any, k: Any, k_scale: Any, weights: Any, starts: Any, ends: Any) -> Any:
    return deep_gemm.fp8_mqa_logits(q, (k, k_scale), weights, starts, ends)


ENTRY_POINTS: dict[str, tuple[Callable[..., Any], dict[str, np.ndarray]]] = {
    "select": (lambda **a: misa.select(**a, config=CONFIG, scores=True), _select()),
    "select_paged": (lambda **a: misa.select_paged(**a, config=CONFIG), _select_paged()),
    "select_paged, flat": (
        lambda **a: misa.select_paged(**a, config=CONFIG),
        _select_paged((64 * (D + 4),)),
    ),
    "compare": (lambda **a: misa.compare(**a, configs=[CONFIG], baseline=CONFIG), _select()),
    "Plan.run": (_run, _select()),
    "route_from_means": (lambda **a: misa.route_from_means(**a, heads=2), _means()),
    "keep_blocks_from_means": (
        lambda **a: misa.keep_blocks_from_means(**a, filter_blocks=2),
        _means(),
    ),
    "append": (misa.append, _append()),
    "rebuild": (misa.rebuild, _rebuild()),
    "copy_pages": (misa.copy_pages, _copy_pages()),
    "fp8_mqa_logits": (_fp8_mqa_logits, _logits()),
}


def _layouts(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array without elements, dense first, then with other strides."""
    assert array.size == 0
    yield array
    item, dims = array.itemsize, array.ndim
    dense = array.strides
    for strides in (
        (0,) * dims,
        (item,) * dims,
        tuple(-each for each in dense),
        dense[::-1],
        tuple(7 * item * (i + 1) for i in range(dims)),
        (1 << 40,) * dims,
    ):
        yield np.lib.stride_tricks.as_strided(array, array.shape, strides)


def _outcome(call: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """The result in words, or the error."""
    try:
        with np.errstate(all="ignore"):
            result = call(**arguments)
    except ValueError as error:
        # numpy's own complaints aside, an error names what is wrong.
        assert "expected" in str(error) or "broadcast" in str(error), error
        return str(error)
    if isinstance(result, tuple):
        return str([None if each is None else np.asarray(each).tolist() for each in result])
    return str(result if result is None or isinstance(result, list) else result.tolist())


def _zeroed(shapes: dict[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Each dimension of each argument at zero, alone and wherever else the call has it."""
    for name, array in shapes.items():
        for dimension, size in enumerate(array.shape):
            alone = dict(shapes)
            alone[name] = np.take(array, [], axis=dimension)
            yield f"{name}, dimension {dimension}", alone
            # Sizes are distinct where they mean different things, T and B aside.
            everywhere = {
                other: np.zeros([0 if each == size else each for each in entry.shape], entry.dtype)
                for other, entry in shapes.items()
            }
            yield f"every dimension of {size}", everywhere


CASES = [
    pytest.param(entry, what, id=f"{entry}: {what}")
    for entry, (_, shapes) in ENTRY_POINTS.items()
    for what in dict(_zeroed(shapes))
]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize(("entry", "what"), CASES)
def test_layout_of_nothing(entry: str, what: str, framework: str) -> None:
    call, shapes = ENTRY_POINTS[entry]
    arguments = dict(_zeroed(shapes))[what]

    def convert(array: np.ndarray) -> Any:
        if framework == "numpy":
            return array
        dense = torch.from_numpy(np.zeros(array.shape, array.dtype))
        if array.size or any(each < 0 for each in array.strides):
            return torch.from_numpy(array.copy())
        return dense.as_strided(array.shape, [each // array.itemsize for each in array.strides])

    expected = _outcome(call, {name: convert(array) for name, array in arguments.items()})
    for name, array in arguments.items():
        if array.size:
            continue
        for other in _layouts(array):
            changed = {
                each: convert(other if each == name else entry) for each, entry in arguments.items()
            }
            assert _outcome(call, changed) == expected, (name, other.strides)


def test_nothing_is_selected_from_nothing() -> None:
    """Calls without queries, and without keys, are right ones."""
    for keys in (0, L):
        none = {
            "q": _ones(0, H, D), "w": _ones(0, H), "k": _ones(keys, D),
            "ks": np.zeros(0, "i4"), "ke": np.zeros(0, "i4"),
        }  # fmt: skip
        assert misa.select(**none, config=CONFIG).indices.shape == (0, 4)
    seen = {"ks": np.zeros(T, "i4"), "ke": np.zeros(T, "i4")}
    picked = misa.select(_ones(T, H, D), _ones(T, H), _ones(0, D), **seen, config=CONFIG)
    assert (picked.indices == -1).all()
    for shape in ((0, 64, D + 4), (0, 64 * (D + 4))):
        arguments = _select_paged() | {
            "cache": np.zeros(shape, "u1"),
            "page_sums": np.zeros((0, 1, D), "f4"),
            "largest_scales": np.zeros((0, 1), "f4"),
            "sketches": np.zeros((0, 64 * (D // 4 + 2)), "u1"),
            "block_table": np.zeros((B, 0), "i4"),
            "context_lens": np.zeros(B, "i4"),
        }
        for convert in (np.asarray, torch.from_numpy):
            call = {name: convert(array) for name, array in arguments.items()}
            assert (misa.select_paged(**call, config=CONFIG).indices == -1).all()
