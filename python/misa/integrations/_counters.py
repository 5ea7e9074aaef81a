# SPDX-License-Identifier: Apache-2.0
"""Counts which path selected for the rows of a serving engine, and logs why."""

from __future__ import annotations

import collections
import logging


class Counters:
    """Rows of this process by path: misa_prefill, misa_decode, engine_prefill, engine_decode.

    Rows of a replayed CUDA graph are not counted, because the replay runs no Python.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.rows: collections.Counter[str] = collections.Counter()
        self._logger = logger
        self._calls = 0
        self._reasons: set[str] = set()

    def add(self, path: str, rows: int) -> None:
        """Counts the rows of one call. Logs the counts whenever the number of calls doubles: only
        the log of an engine's worker processes can be observed.
        """
        self.rows[path] += rows
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.rows.items()))
            self._logger.info("MISA: rows so far: %s", counts)

    def misa_selects(self, work: str, rows: int, reason: str | None) -> bool:
        """Counts the rows of `work` (prefill or decode) for MISA, or for the engine if there is a
        reason to leave them to it, which is logged once. Returns whether MISA selects for them.
        """
        if reason is not None and reason not in self._reasons:
            self._reasons.add(reason)
            self._logger.warning("MISA: %s left to the engine's own operator: %s", work, reason)
        self.add(f"{'misa' if reason is None else 'engine'}_{work}", rows)
        return reason is None
