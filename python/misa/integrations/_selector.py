# SPDX-License-Identifier: Apache-2.0
"""What the plugins for serving engines run: plans made once for bounds, and their workspace."""

from __future__ import annotations

import atexit
import bisect
from typing import NamedTuple

import torch

import misa

_PAGE = 64


class Bounds(NamedTuple):
    """The largest call of one kind.

    rows: queries.
    keys: that one query sees.
    total: keys of a call on contiguous keys; 0 for a call on pages.
    sequences: of a call on pages; 0 for a call on contiguous keys.
    """

    rows: int
    keys: int
    total: int = 0
    sequences: int = 0


class Derived(NamedTuple):
    """What is kept of the keys of a cache beside it, for decode; see misa.append."""

    page_sums: torch.Tensor | None
    largest_scales: torch.Tensor | None
    sketches: torch.Tensor | None


NOTHING = Derived(None, None, None)


class Selector:
    """An indexer for all layers of a model, whose calls run in order on one stream.

    Everything is made here: a call allocates nothing, does not wait for the device, and may be
    captured into a CUDA graph.
    """

    def __init__(
        self,
        config: misa.Config,
        *,
        heads: int,
        dim: int,
        prefill: Bounds,
        decode: Bounds | None,
        device: torch.device,
    ) -> None:
        """Plans for e4m3 queries and keys; `decode` None: no calls on pages.

        `prefill.total` and `decode.sequences` are halved until a plan has enough memory.

        Raises ValueError, MemoryError or RuntimeError if MISA cannot do it on this device.
        """
        self.config = config
        self.device = device
        self._dim = dim
        # Bytes of the sketch of a page; 0 without one.
        self._sketch = _PAGE * {0: 0, 2: dim // 4 + 2, 4: dim // 2 + dim // 32}[config.sketch]
        routed = config.router == "pooled" and config.heads < heads
        self._sums = routed or config.filter_block > 0

        def plan(bounds: Bounds) -> misa.Plan:
            return misa.Plan(
                config,
                tokens=bounds.rows,
                heads=heads,
                dim=dim,
                max_keys=bounds.keys,
                total_keys=bounds.total or None,
                batch=bounds.sequences,
                q_dtype="e4m3",
                k_dtype="e4m3",
                device=device,
            )

        def largest(bounds: Bounds) -> tuple[Bounds, misa.Plan]:
            while True:
                try:
                    return bounds, plan(bounds)
                except (MemoryError, ValueError):
                    if bounds.total <= bounds.keys and bounds.sequences <= 1:
                        raise
                total = bounds.total and max(bounds.total // 2, bounds.keys)
                bounds = bounds._replace(total=total, sequences=bounds.sequences // 2)

        self.prefill, first = largest(prefill)
        plans = [first]
        self.decode: Bounds | None = None
        self._sizes: list[int] = []
        if decode is not None:
            self.decode, last = largest(decode)
            # How work is cut follows from the planned rows: few rows have plans of their own.
            self._sizes = [1 << bits for bits in range((decode.rows - 1).bit_length())]
            for size in self._sizes:
                sequences = min(size, self.decode.sequences)
                plans.append(plan(decode._replace(rows=size, sequences=sequences)))
            self._sizes.append(decode.rows)
            plans.append(last)
        # The compiled plans are called without misa.Plan's checks, which take longer than the rest
        # of a call; the bindings check every array again.
        self._ragged = first._plan.run
        self._paged = [plan._plan.run_paged for plan in plans[1:]]
        size = max(plan.workspace_bytes for plan in plans)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.backend = first.backend
        atexit.register(self._close)

    def _close(self) -> None:
        # nanobind would report plans that outlive the interpreter as leaks.
        del self._ragged, self._paged

    @property
    def derives(self) -> bool:
        """Whether decode reads what is derived from the keys."""
        return self.decode is not None and (self._sums or self._sketch > 0)

    def derived(self, cache: torch.Tensor) -> Derived:
        """Memory for what is derived from the keys of `cache` [pages, 64, D + 4]; without keys."""

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros((cache.shape[0], *shape), dtype=dtype, device=cache.device)

        return Derived(
            zeros(torch.float32, 1, self._dim) if self._sums else None,
            zeros(torch.float32, 1) if self._sums else None,
            zeros(torch.uint8, self._sketch) if self._sketch else None,
        )

    def derive(self, derived: Derived, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """For the keys that were written into `slots` int64; -1 is none."""
        misa.append(cache, None, slots, **derived._asdict())

    def _where(self) -> tuple:
        """The last arguments of a run: the workspace, and on a device the stream."""
        if self.device.type == "cpu":
            return (self._workspace,)
        return self._workspace, torch.cuda.current_stream(self.device).cuda_stream

    def ragged(
        self,
        q: torch.Tensor,
        w: torch.Tensor,
        k: torch.Tensor,
        ks: torch.Tensor,
        ke: torch.Tensor,
        k_scale: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """misa.select into `out` int32 [rows, top_k], whose rows may have a stride."""
        bits = q.view(torch.uint8), w, k.view(torch.uint8), ks, ke, k_scale
        self._ragged(*bits, out, None, None, None, None, *self._where())

    def paged(
        self,
        q: torch.Tensor,
        w: torch.Tensor,
        cache: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        out: torch.Tensor,
        *,
        starts: torch.Tensor | None = None,
        derived: Derived = NOTHING,
        slots: bool = False,
    ) -> None:
        """misa.select_paged into `out` int32 [rows, top_k], whose rows may have a stride.

        lengths: int32 [sequences], or [sequences, next_n] of each row; starts: query_starts.
        """
        next_n = lengths.shape[1] if lengths.dim() == 2 else 1
        plan = bisect.bisect_left(self._sizes, max(q.shape[0], lengths.shape[0]))
        keys = cache, table, lengths, starts, *derived, next_n
        forms = out, None, None, None, slots, None
        self._paged[plan](q.view(torch.uint8), w, *keys, *forms, *self._where())
