# SPDX-License-Identifier: Apache-2.0
"""What the plugins for serving engines run: plans made once for bounds, and their workspace."""

from __future__ import annotations

import atexit
from typing import NamedTuple

import torch

import misa


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
        # Of a page of 64 tokens; 0 without a sketch.
        sizes = {0: 0, 2: dim // 4 + 2, 4: dim // 2 + dim // 32}
        self.sketch_bytes = 64 * sizes[config.sketch]

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
        self.decode: Bounds | None = None
        last = first
        if decode is not None:
            self.decode, last = largest(decode)
        # The compiled plans are called without misa.Plan's checks, which take longer than the rest
        # of a call; the bindings check every array again.
        self._ragged = first._plan.run
        self._paged = last._plan.run_paged
        size = max(first.workspace_bytes, last.workspace_bytes)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.backend = first.backend
        atexit.register(self._close)

    def _close(self) -> None:
        # nanobind would report plans that outlive the interpreter as leaks.
        del self._ragged, self._paged

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
        sketches: torch.Tensor | None = None,
        slots: bool = False,
    ) -> None:
        """misa.select_paged into `out` int32 [rows, top_k], whose rows may have a stride.

        lengths: int32 [sequences], or [sequences, next_n] of each row; starts: query_starts.
        """
        next_n = lengths.shape[1] if lengths.dim() == 2 else 1
        keys = cache, table, lengths, starts, None, None, sketches, next_n
        forms = out, None, None, None, slots, None
        self._paged(q.view(torch.uint8), w, *keys, *forms, *self._where())
