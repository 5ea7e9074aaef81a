# SPDX-License-Identifier: Apache-2.0
"""Judges selected positions row by row, in the engine's process, on what its indexer was given.

A row has the queries and weights of one token, the pages of its sequence and how many keys it sees.
Its positions are compared with what the engine's own kernels select from the same inputs, and with
the exact scores of the same keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import misa

PAGE, DIM = 64, 128


@dataclasses.dataclass
class Row:
    """One token of one layer; tensors on the device."""

    q: torch.Tensor  # uint8 [H, D], the bits of e4m3
    w: torch.Tensor  # f32 [H]
    table: torch.Tensor  # int32 [pages]
    seen: int
    got: torch.Tensor  # int32 [top_k], MISA's positions
    engine: torch.Tensor | None  # the engine's, or None where it has none to compare


@dataclasses.dataclass
class Tally:
    """What has been judged so far."""

    rows: int = 0
    short: int = 0  # rows that see no more than top_k keys
    padding: int = 0
    replayed: int = 0
    share: float = 0.0  # sum over long rows: of MISA's positions, those that the engine has too
    least: float = 1.0
    noise: float = 0.0  # sum over long rows: of the engine's, those that are not among the exact
    beside: float = 0.0  # sum over long rows: of MISA's, those that are not among the exact
    farthest: float = 0.0  # of a position that differs to the k-th score, in units of the tolerance
    compared: int = 0  # long rows with the engine's positions
    faults: list[str] = dataclasses.field(default_factory=list)

    def fault(self, text: str) -> None:
        if text not in self.faults and len(self.faults) < 20:
            self.faults.append(text)

    def summary(self) -> dict[str, Any]:
        long, compared = max(self.rows - self.short, 1), max(self.compared, 1)
        return {
            "rows": self.rows,
            "short": self.short,
            "padding": self.padding,
            "replayed": self.replayed,
            "overlap": round(self.share / compared, 6),
            "least": round(self.least, 4),
            "engine_beside_exact": round(self.noise / compared, 6),
            "misa_beside_exact": round(self.beside / long, 6),
            "farthest": round(self.farthest, 4),
            "faults": self.faults,
        }


def keys_of(cache: torch.Tensor, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys f32 [seen, D] and scales [seen] of a row's sequence, from the bytes of its pages."""
    pages = row.table[: (row.seen + PAGE - 1) // PAGE].long()
    flat = cache[pages].reshape(len(pages), -1)
    keys = flat[:, : PAGE * DIM].reshape(-1, DIM).view(torch.float8_e4m3fn).float()
    scales = flat[:, PAGE * DIM : PAGE * (DIM + 4)].contiguous().view(torch.float32).reshape(-1)
    return keys[: row.seen], scales[: row.seen]


def exact_scores(cache: torch.Tensor, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores f64 [seen], and how far an FP8 product of Hopper may be from them.

    A step of a product adds 32 products, each cut off at 2^-13 of the largest (docs/numerics.md).
    """
    keys, scales = (tensor.double() for tensor in keys_of(cache, row))
    q, w = row.q.view(torch.float8_e4m3fn).float().double(), row.w.double()[:, None]
    dots = q @ keys.T
    largest = (q.abs() @ keys.abs().T + dots.abs()) / 2
    scores = (w * dots.relu()).sum(0) * scales
    error = (w.abs() * largest).sum(0) * scales.abs() * (DIM // 32 * 33 * 2.0**-13)
    return scores, error


def judge(row: Row, cache: torch.Tensor, tally: Tally, name: str, exact_set: bool) -> None:
    """Adds one row to the tally; `exact_set`: whether its indexer is to find the top k."""
    got, top_k = row.got[row.got >= 0].long(), row.got.shape[0]
    if row.seen <= 0:
        tally.padding += 1
        if len(got):
            tally.fault(f"{name}: a row that sees no key has {len(got)} positions")
        return
    tally.rows += 1
    expected = min(row.seen, top_k)
    unique = torch.unique(got)
    if len(unique) != expected or len(got) != expected or int(unique[-1]) >= row.seen:
        tally.fault(f"{name}: expected {expected} positions of {row.seen}, got {len(unique)}")
        return
    if bool((row.got[expected:] != -1).any()):
        tally.fault(f"{name}: positions behind the first {expected}")
    if row.seen <= top_k:
        tally.short += 1
        return
    scores, error = exact_scores(cache, row)

    def mask(positions: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(row.seen, dtype=torch.bool, device=scores.device)
        found[positions[positions >= 0].long()] = True
        return found

    best = scores.topk(top_k)
    exact, own = mask(best.indices), mask(got)
    far = (scores - best.values[-1]).abs() / (2 * error.max())
    differs = own ^ exact
    tally.beside += float((own & ~exact).sum()) / top_k
    if row.engine is not None:
        theirs = mask(row.engine)
        share = float((own & theirs).sum()) / top_k
        tally.compared += 1
        tally.share += share
        tally.least = min(tally.least, share)
        tally.noise += float((theirs & ~exact).sum()) / top_k
        differs = differs | (own ^ theirs)
    worst = float(far[differs].max()) if bool(differs.any()) else 0.0
    tally.farthest = max(tally.farthest, worst)
    if worst > 1 and exact_set:
        tally.fault(f"{name}: a position is {worst:.2f} tolerances from the k-th score")


def replay(
    rows: list[Row], cache: torch.Tensor, config: misa.Config, tally: Tally, name: str
) -> None:
    """The recorded rows alone, and in the reverse order among copies of each other: the same
    positions as in the engine's batch."""
    rows = [row for row in rows if row.seen > 0]
    if not rows:
        return
    sketches = None
    if config.sketch:  # made anew from the keys
        size = PAGE * (DIM // 4 + 2 if config.sketch == 2 else DIM // 2 + DIM // 32)
        sketches = torch.zeros((cache.shape[0], size), dtype=torch.uint8, device=cache.device)
        used = [row.table[: (row.seen + PAGE - 1) // PAGE] for row in rows]
        misa.rebuild(cache, None, torch.unique(torch.cat(used)), sketches=sketches)

    def selected(batch: list[Row]) -> torch.Tensor:
        out = misa.select_paged(
            torch.stack([row.q for row in batch]),
            torch.stack([row.w for row in batch]),
            cache,
            torch.stack([row.table for row in batch]),
            torch.tensor([row.seen for row in batch], dtype=torch.int32, device=cache.device),
            sketches=sketches,
            config=config,
        )
        return out.indices.sort(1).values

    wanted = torch.stack([row.got for row in rows]).sort(1).values
    alone = torch.cat([selected([row]) for row in rows])
    among = selected([rows[0], *reversed(rows), rows[-1]])[1:-1].flip(0)
    for how, again in (("alone", alone), ("in another batch", among)):
        different = int((again != wanted).any(1).sum())
        if different:
            tally.fault(f"{name}: {different} of {len(rows)} rows select otherwise {how}")
    tally.replayed += len(rows)
