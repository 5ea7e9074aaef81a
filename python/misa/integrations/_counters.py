# SPDX-License-Identifier: Apache-2.0
"""Counts which path selected for the rows of a serving engine, and logs why."""

from __future__ import annotations

import collections
import logging

import torch

_PATHS = ("misa_prefill", "misa_decode", "engine_prefill", "engine_decode")


class Counters:
    """Rows of this process by path: misa_prefill, misa_decode, engine_prefill, engine_decode.

    A row of a captured CUDA graph counts whenever the graph is replayed, by a kernel that was
    captured with it; the rows that pad the graph's batch count too.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._eager: collections.Counter[str] = collections.Counter()
        self._replayed: dict[str, torch.Tensor] = {}
        self._calls = 0
        self._reasons: set[tuple[str, str]] = set()

    def prepare(self, device: torch.device | str) -> None:
        """Makes the counters that captured kernels add to; before the first capture, of which
        nothing is counted otherwise."""
        if not self._replayed:
            counts = torch.zeros(len(_PATHS), dtype=torch.int64, device=device)
            self._replayed = dict(zip(_PATHS, counts, strict=True))

    @property
    def rows(self) -> dict[str, int]:
        """The counts so far, without paths that no row took. Waits for the device."""
        total = collections.Counter(self._eager)
        for path, count in self._replayed.items():
            total[path] += int(count)
        return {path: total[path] for path in _PATHS if total[path]}

    def add(self, path: str, rows: int, capturing: bool = False) -> None:
        """Counts the rows of one call, or those of every replay of a call that is captured.

        Logs the counts whenever the number of calls doubles: only the log of an engine's worker
        processes can be observed.
        """
        if capturing:
            if path in self._replayed:
                self._replayed[path].add_(rows)
            return
        self._eager[path] += rows
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.rows.items()))
            self._logger.info("MISA: rows so far: %s", counts)

    def leave(self, work: str, reason: str) -> None:
        """Says, once, why `work` (prefill or decode) is left to the engine."""
        if (work, reason) not in self._reasons:
            self._reasons.add((work, reason))
            self._logger.warning("MISA: %s left to the engine's own operator: %s", work, reason)
