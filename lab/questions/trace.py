# SPDX-License-Identifier: Apache-2.0
"""A trace of an indexer, what the package selects on it, and shares of what is wanted."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import misa

ATTENTION_ROWS = 32  # the last rows, whose dense attention a trace may have
BLOCK, NEAR = 8, 8  # rows in a block of neighbours, and how far apart two of them may be


@dataclass(frozen=True, eq=False)
class Trace:
    """Rows of one layer and the keys that they see, as `misa compare` reads them.

    q [T, H, D], w [T, H], k [L, D]; k_scale [L] with keys of e4m3; ks, ke int32 [T].
    attention: float32 [A, L], the dense attention of the last A rows, averaged over heads; A may
        be 0.
    """

    name: str
    model: str
    source: str
    q: torch.Tensor
    w: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor | None
    ks: torch.Tensor
    ke: torch.Tensor
    attention: torch.Tensor

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def seen(self) -> np.ndarray:
        """int [T]: how many keys each row sees."""
        return (self.ke - self.ks).numpy()

    @property
    def keys(self) -> torch.Tensor:
        """float32 [L, D]"""
        k = self.k.float()
        return k if self.k_scale is None else k * self.k_scale[:, None]

    def rows(self, chosen: np.ndarray) -> Trace:
        """The trace of some of its rows, a mask [T]."""
        mask = torch.from_numpy(chosen)
        attended = len(mask) - len(self.attention)
        return replace(
            self,
            q=self.q[mask],
            w=self.w[mask],
            ks=self.ks[mask],
            ke=self.ke[mask],
            attention=self.attention[mask[attended:]],
        )


def load(path: Path) -> Trace:
    """Raises ValueError for a file that is no safetensors file, or without the tensors of a trace
    of contiguous keys."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file: {error}") from None
    missing = [name for name in ("q", "w", "k") if name not in tensors]
    if missing:
        raise ValueError(f"{path}: expected the tensors q, w and k, got none called {missing[0]}")
    q, k = tensors["q"], tensors["k"]
    tokens, length = len(q), len(k)
    ends = torch.arange(length - tokens + 1, length + 1, dtype=torch.int32)
    return Trace(
        name=path.stem.removeprefix("trace_"),
        model=metadata.get("model", ""),
        source=metadata.get("source", ""),
        q=q,
        w=tensors["w"],
        k=k,
        k_scale=tensors.get("k_scale"),
        ks=tensors.get("ks", torch.zeros(tokens, dtype=torch.int32)),
        ke=tensors.get("ke", ends),
        attention=tensors.get("attn_last32", torch.zeros(0, length)).float(),
    )


def select(trace: Trace, config: misa.Config) -> np.ndarray:
    """Positions int32 [T, top_k] of every row."""
    found = misa.select(
        trace.q, trace.w, trace.k, trace.ks, trace.ke, k_scale=trace.k_scale, config=config
    )
    return found.indices.numpy()


def routed(trace: Trace, config: misa.Config) -> np.ndarray:
    """The heads [T, h] that a config routes."""
    arrays = trace.q, trace.w, trace.k, trace.ks, trace.ke
    found = misa.select(*arrays, k_scale=trace.k_scale, config=config, heads=True)
    return found.heads.numpy()


def select_given(trace: Trace, lists: Sequence[np.ndarray], indexer: str, **settings: Any) -> Any:
    """Positions [T, top_k] where row t routes the heads lists[t]: the router "static", once for
    every list that differs."""
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for t, heads in enumerate(lists):
        alike[tuple(sorted(map(int, heads)))].append(t)
    found = np.empty((len(lists), settings["top_k"]), np.int32)
    for heads, places in alike.items():
        chosen = np.zeros(len(lists), bool)
        chosen[places] = True
        config = misa.Config(
            indexer, router="static", heads=len(heads), static_heads=heads, **settings
        )
        found[chosen] = select(trace.rows(chosen), config)
    return found


def scores_of(trace: Trace) -> np.ndarray:
    """float32 [T, N], DSA's score of every position, -inf where a row sees none."""
    longest = int(trace.seen.max())
    found = misa.select(
        trace.q, trace.w, trace.k, trace.ks, trace.ke, k_scale=trace.k_scale, scores=True,
        config=misa.Config("dsa", top_k=longest),
    )  # fmt: skip
    result = np.full((len(trace.q), longest + 1), -np.inf, np.float32)
    np.put_along_axis(result, found.indices.numpy().astype(int), found.scores.numpy(), 1)
    return result[:, :-1]  # where padding was put


def best_of(pool: np.ndarray, scores: np.ndarray, top_k: int) -> np.ndarray:
    """Of each row's pool of positions [T, n], -1 for none, the top_k of largest scores [T, N]."""
    found = np.full((len(pool), top_k), -1)
    for t, places in enumerate(pool):
        places = np.unique(places[places >= 0])
        order = np.argsort(-scores[t, places], kind="stable")[:top_k]
        found[t, : len(order)] = places[order]
    return found


def shares(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[T]: of each row's wanted positions [T, n], the share that is found; -1 is no position. NaN
    where nothing is wanted."""
    result = np.full(len(wanted), np.nan)
    for t, (want, have) in enumerate(zip(wanted, found, strict=True)):
        want = want[want >= 0]
        if len(want):
            result[t] = np.isin(want, have).mean()
    return result


def missing(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of the wanted positions [T, n] those that are not found; the others become -1."""
    result = wanted.copy()
    for want, have in zip(result, found, strict=True):
        want[np.isin(want, have)] = -1
    return result


def attended(trace: Trace, wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[T]: the attention that the found positions keep, beside what the wanted ones keep; NaN for
    rows whose attention the trace does not have."""
    result = np.full(len(wanted), np.nan)
    first = len(wanted) - len(trace.attention)
    for t, row in enumerate(trace.attention.numpy(), first):
        row = row[trace.ks[t] :]
        kept, whole = (row[x[t][x[t] >= 0]].sum() for x in (found, wanted))
        if whole > 0:
            result[t] = kept / whole
    return result


def blocks(trace: Trace) -> np.ndarray:
    """int [T]: the number of each row's block of neighbours: up to 8 rows that follow each other
    by at most 8 positions."""
    numbers, size = [0], 1
    for before, after in pairwise(trace.ke.tolist()):
        joined = 0 <= after - before <= NEAR and size < BLOCK
        size = size + 1 if joined else 1
        numbers.append(numbers[-1] + (not joined))
    return np.array(numbers)


def of_blocks(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The mean of each block's values that are not NaN, of the blocks that have any."""
    known = ~np.isnan(values)
    return np.array([values[known & (numbers == n)].mean() for n in np.unique(numbers[known])])


def largest(values: np.ndarray, h: int) -> list[np.ndarray]:
    """Of values [T, H] the heads of the h largest of each row; of equal ones the lower head."""
    return list(np.argsort(-values, axis=1, kind="stable")[:, :h])


def description(trace: Trace) -> dict[str, Any]:
    return {
        "name": trace.name,
        "model": trace.model,
        "source": trace.source,
        "heads": trace.heads,
        "keys": len(trace.k),
        "rows": len(trace.q),
        "blocks": int(blocks(trace)[-1]) + 1,
    }


def dump(path: Path, value: dict[str, Any]) -> None:
    """JSON, in which a list of lists is one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(
        r"\[\n\s+\[.*?\]\n\s+\]", lambda found: re.sub(r"\n\s*", "", found[0]), text, flags=re.S
    )
    path.write_text(text + "\n")
