# SPDX-License-Identifier: Apache-2.0
"""Sequences in a paged key cache, as serving engines hold them, and what they have to select."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

import misa

PAGE = 64
DIM = 128
HEADS = 16


@dataclass
class Sequences:
    """Sequences of the given lengths in a cache with padded pages; whatever no key was written to
    is NaN.

    cache: uint8 [pages, 64, D + 4]; table: int32 [sequences, max_pages].
    """

    lengths: list[int]
    seed: int = 1
    cache: torch.Tensor = field(init=False)
    table: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        counts = [math.ceil(length / PAGE) for length in self.lengths]
        order = torch.randperm(sum(counts) + 3, generator=generator)
        padded = torch.full((len(order), PAGE * (DIM + 4) + 256), 255, dtype=torch.uint8)
        self.cache = padded[:, : PAGE * (DIM + 4)].unflatten(1, (PAGE, DIM + 4))
        self.table = torch.zeros((len(counts), max(counts) + 1), dtype=torch.int32)
        first = 0
        for row, count in enumerate(counts):
            self.table[row, :count] = order[first : first + count]
            first += count
        keys = torch.randn((sum(self.lengths), DIM), generator=generator)
        slots = [self.slot(row, p) for row, n in enumerate(self.lengths) for p in range(n)]
        misa.append(self.cache, keys, torch.tensor(slots), scale_format="ue8m0")

    def slot(self, sequence: int, position: int) -> int:
        """Where a token lies: page * 64 + offset."""
        return int(self.table[sequence, position // PAGE]) * PAGE + position % PAGE

    def keys(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys e4m3 [n, D] and scales f32 [n] of one sequence, read token by token."""
        length = self.lengths[sequence]
        k = torch.empty((length, DIM), dtype=torch.uint8)
        scale = torch.empty((length, 4), dtype=torch.uint8)
        for position in range(length):
            page, offset = divmod(self.slot(sequence, position), PAGE)
            content = self.cache[page].flatten()
            k[position] = content[offset * DIM :][:DIM]
            scale[position] = content[PAGE * DIM + 4 * offset :][:4]
        return k.view(torch.float8_e4m3fn), scale.view(torch.float32).squeeze(1)

    def expected(
        self,
        q: torch.Tensor,
        w: torch.Tensor,
        rows: list[tuple[int, int]],
        config: misa.Config,
    ) -> torch.Tensor:
        """Positions int32 [rows, top_k], sorted, by misa.select on contiguous keys; rows holds each
        query's sequence and how many keys it sees.
        """
        out = torch.full((len(rows), config.top_k), -1, dtype=torch.int32)
        keys = {sequence: self.keys(sequence) for sequence in {sequence for sequence, _ in rows}}
        for row, (sequence, seen) in enumerate(rows):
            if seen > 0:
                k, scale = keys[sequence]
                start, end = torch.zeros(1, dtype=torch.int32), torch.tensor([seen]).int()
                out[row] = misa.select(
                    q[row : row + 1], w[row : row + 1], k, start, end, k_scale=scale, config=config
                ).indices[0]
        return out.sort(1).values


def queries(rows: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries e4m3 [rows, H, D] and weights f32 [rows, H]."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((rows, HEADS, DIM), generator=generator).to(torch.float8_e4m3fn)
    return q, torch.randn((rows, HEADS), generator=generator)


def new_rows(lengths: list[int], new: list[int], first: int = 0) -> list[tuple[int, int]]:
    """(sequence, keys seen) of the last `new` tokens of each sequence, numbered from `first`."""
    return [
        (first + index, length - count + 1 + i)
        for index, (length, count) in enumerate(zip(lengths, new, strict=True))
        for i in range(count)
    ]


def gather(
    cache: torch.Tensor,
    k: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
    cu_lengths: torch.Tensor,
) -> None:
    """What the engines' kernels do: keys of the sequences of `table`, one after the other, into
    k [L, D] e4m3 and scale uint8 [L, 4]. Places beyond the last key are left as they are.
    """
    for row in range(table.shape[0]):
        for place in range(int(cu_lengths[row]), int(cu_lengths[row + 1])):
            page, offset = divmod(place - int(cu_lengths[row]), PAGE)
            content = cache[int(table[row, page])].flatten()
            k.view(torch.uint8)[place] = content[offset * DIM :][:DIM]
            scale[place] = content[PAGE * DIM + 4 * offset :][:4]
