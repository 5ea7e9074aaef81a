# SPDX-License-Identifier: Apache-2.0
"""What the plugins for serving engines run: plans made once for bounds, and their workspace."""

from __future__ import annotations

import atexit
import bisect
import weakref
from typing import NamedTuple

import torch
from torch.utils.dlpack import to_dlpack

import misa

PAGE = 64

# Prefills of fewer rows have plans of their own.
_FEW_ROWS = 64

# Up to so many keys in a call, about every 128th is sampled to find a row's threshold. A plan for
# many more takes so much memory for each row that fewer rows can be selected at once.
_NEAR = 1 << 19


def _powers(first: int, end: int) -> list[int]:
    """`first`, twice as much, and so on, below `end`."""
    return [first << i for i in range(max((end - 1) // first, 0).bit_length())]


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
        self._sketch = PAGE * {0: 0, 2: dim // 4 + 2, 4: dim // 2 + dim // 32}[config.sketch]
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

        # How work is cut follows from the planned rows and keys: few rows have plans of their own,
        # and so have calls on keys of very many sequences, which would make the others slow.
        near, last = largest(prefill._replace(total=min(prefill.total, max(prefill.keys, _NEAR))))
        self._row_sizes = [*_powers(_FEW_ROWS, prefill.rows), prefill.rows]
        ragged = [plan(near._replace(rows=size)) for size in self._row_sizes[:-1]] + [last]
        self.prefill, far = near, last
        if prefill.total > near.total:
            self.prefill, far = largest(prefill)
        self._near = near.total
        self.decode: Bounds | None = None
        self._sizes: list[int] = []
        paged: list[misa.Plan] = []
        if decode is not None:
            self.decode, last = largest(decode)
            self._sizes = [*_powers(1, decode.rows), decode.rows]
            for size in self._sizes[:-1]:
                sequences = min(size, self.decode.sequences)
                paged.append(plan(decode._replace(rows=size, sequences=sequences)))
            paged.append(last)
        # The compiled plans are called without misa.Plan's checks, which take longer than the rest
        # of a call; the bindings check every array again. They are given capsules that PyTorch's
        # C++ code makes: a tensor's own __dlpack__ is Python code and takes ten times as long.
        self._ragged = [plan._plan.run for plan in ragged]
        self._far = far._plan.run
        self._paged = [plan._plan.run_paged for plan in paged]
        size = max(plan.workspace_bytes for plan in (*ragged, far, *paged))
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.backend = far.backend
        _selectors.add(self)

    def _close(self) -> None:
        del self._ragged, self._far, self._paged

    @property
    def derives(self) -> bool:
        """Whether decode reads what is derived from the keys."""
        return self.decode is not None and (self._sums or self._sketch > 0)

    @property
    def key_bytes(self) -> int:
        """Of a key in a cache, with its scale."""
        return self._dim + 4

    @property
    def derived_bytes(self) -> int:
        """Of what is derived from a page."""
        return (4 * self._dim + 4 if self._sums else 0) + self._sketch

    def derived(self, cache: torch.Tensor) -> Derived:
        """What is derived from the bytes of `cache` [pages, 64, D + 4], in memory of its own."""

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros((cache.shape[0], *shape), dtype=dtype, device=cache.device)

        made = Derived(
            zeros(torch.float32, 1, self._dim) if self._sums else None,
            zeros(torch.float32, 1) if self._sums else None,
            zeros(torch.uint8, self._sketch) if self._sketch else None,
        )
        self.rebuild(made, cache, torch.arange(cache.shape[0], dtype=torch.int32))
        return made

    def rebuild(self, derived: Derived, cache: torch.Tensor, pages: torch.Tensor) -> None:
        """From the bytes of `pages` int32, each given once, in host memory."""
        misa.rebuild(cache, pages=pages.to(cache.device), **derived._asdict())

    def derive(self, derived: Derived, cache: torch.Tensor, slots: torch.Tensor) -> None:
        """For the keys that were written into `slots` int64; -1 is none."""
        misa.append(cache, None, slots, **derived._asdict())

    def _where(self) -> tuple:
        """The last arguments of a run: the workspace, and on a device the stream."""
        workspace = to_dlpack(self._workspace)
        if self.device.type == "cpu":
            return (workspace,)
        return workspace, torch.cuda.current_stream(self.device).cuda_stream

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
        run = self._far
        if k.shape[0] <= self._near:
            run = self._ragged[bisect.bisect_left(self._row_sizes, q.shape[0])]
        tensors = q.view(torch.uint8), w, k.view(torch.uint8), ks, ke, k_scale, out
        run(*map(to_dlpack, tensors), None, None, None, None, *self._where())

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
        tensors = q.view(torch.uint8), w, cache, table, lengths
        given = [None if tensor is None else to_dlpack(tensor) for tensor in (starts, *derived)]
        forms = to_dlpack(out), None, None, None, slots, None
        self._paged[plan](*map(to_dlpack, tensors), *given, next_n, *forms, *self._where())


_selectors: weakref.WeakSet[Selector] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # nanobind would report plans that outlive the interpreter as leaks.
    for selector in _selectors:
        selector._close()
