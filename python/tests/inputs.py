# SPDX-License-Identifier: Apache-2.0
"""Inputs that the tests share, and how far two results may be apart."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from misa.reference import Row

DATA = Path(__file__).parents[2] / "data"
DTYPES = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
}


PACK = [(0, 300), (0, 301), (301, 400), (5, 5)]
"""What the queries of a small pack see: one sequence, another one, nothing."""


@dataclass
class Inputs:
    """Arguments of misa.select."""

    q: np.ndarray
    w: np.ndarray
    k: np.ndarray
    ks: np.ndarray
    ke: np.ndarray
    k_scale: np.ndarray | None = None

    def arguments(self) -> dict[str, np.ndarray | None]:
        return dict(vars(self))


def random_inputs(
    lengths: list[tuple[int, int]],
    *,
    heads: int = 8,
    dim: int = 64,
    keys: int | None = None,
    dtype: str = "f32",
    seed: int = 0,
) -> Inputs:
    """Normal queries and keys; lengths are (ks, ke) a query."""
    rng = np.random.default_rng(seed)
    ks, ke = np.array(lengths, np.int32).reshape(-1, 2).T.copy()
    keys = int(ke.max(initial=0)) if keys is None else keys
    scale = rng.uniform(0.5, 2, keys).astype(np.float32) if dtype == "e4m3" else None
    return Inputs(
        rng.standard_normal((len(ks), heads, dim)).astype(DTYPES[dtype]),
        rng.standard_normal((len(ks), heads)).astype(np.float32),
        rng.standard_normal((keys, dim)).astype(DTYPES[dtype]),
        ks,
        ke,
        scale,
    )


def trace_inputs(path: Path, count: int) -> Inputs:
    """The last `count` queries of a real trace (docs/formats.md)."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    numpy_names = {"F32": np.float32, "I32": np.int32, "BF16": ml_dtypes.bfloat16,
                   "F8_E4M3": ml_dtypes.float8_e4m3fn}  # fmt: skip
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            first, last = (8 + size + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(raw[first:last], numpy_names[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    q, k = tensors["q"], tensors["k"]
    total, tokens = len(k), len(q)
    ks = tensors.get("ks", np.zeros(tokens, np.int32))
    ke = tensors.get("ke", (total - tokens + 1 + np.arange(tokens)).astype(np.int32))
    last = slice(tokens - count, tokens)
    return Inputs(q[last], tensors["w"][last], k, ks[last], ke[last], tensors.get("k_scale"))


def program() -> str:
    """The path of the program, which the package installs beside the interpreter."""
    beside = Path(sys.executable).parent
    found = shutil.which("misa", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert found is not None
    return found


def traces() -> Iterator[pytest.ParameterSet]:
    for path in sorted(DATA.glob("*.safetensors")):
        yield pytest.param(path, id=path.stem)


def gamma(roundings: int, unit: float) -> float:
    """The relative error of so many roundings, docs/numerics.md."""
    return roundings * unit / (1 - roundings * unit)


TINY = 2.0**-126
"""What one underflow can take."""


def dot_error(q: np.ndarray, k: np.ndarray, unit: float, extra: int = 0) -> np.ndarray:
    """[..., H]: what a dot product of q [H, D] and k [..., D] may be off by: D additions, the
    product, the scale and three parts of an fp32 row, each of one rounding; `extra` are those that
    k has already; and underflow."""
    dim = q.shape[1]
    terms = np.abs(k) @ np.abs(q).T
    entries = np.abs(k).sum(-1)[..., None] + np.abs(q).sum(-1)
    return gamma(dim + 4 + extra, unit) * terms + TINY * (dim + entries)


def score_error(
    row: Row, heads: np.ndarray, residual: np.ndarray | None, unit: float
) -> np.ndarray:
    """[n]: what a score by these heads and this residual row may be off by."""
    q, w = row.q[heads], np.abs(row.w[heads])
    if residual is not None:
        q, w = np.concatenate([q, [residual]]), np.append(w, 1.0)
    error = dot_error(q, row.k, unit) @ w
    terms = (np.abs(row.k) @ np.abs(q).T) @ w
    return error + gamma(len(q) + 6, unit) * (terms + error) + TINY * len(q)


def check_set(chosen: np.ndarray, exact: np.ndarray, error: np.ndarray, k: int, what: str) -> None:
    """That `chosen` are k of the positions that have the scores `exact`, up to an error of each.

    A position that is chosen and does not belong, or belongs and is not chosen, was ranked on the
    wrong side of another one; both scores were off by at most the largest error, so it has a score
    within twice that of the k-th largest.
    """
    assert len(chosen) == min(k, len(exact)), what
    assert len(np.unique(chosen)) == len(chosen), what
    if len(exact) <= k:
        return
    order = np.lexsort((-exact,))
    wanted, kth = order[:k], exact[order[k - 1]]
    differs = np.setxor1d(chosen, wanted)
    distance = np.abs(exact[differs] - kth)
    assert np.all(distance <= 2 * error.max(initial=0)), (
        f"{what}: positions {differs} are {distance} from the last score, beyond {2 * error.max()}"
    )
