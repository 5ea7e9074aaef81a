# SPDX-License-Identifier: Apache-2.0
"""Which path a serving engine's rows took, and why."""

from __future__ import annotations

import collections
import logging


class Counters:
    """Rows of this process by path: misa_prefill, misa_decode, engine_prefill, engine_decode.

    What an engine replays from a captured graph runs no Python and is not counted.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.rows: collections.Counter[str] = collections.Counter()
        self._logger = logger
        self._calls = 0
        self._reasons: set[str] = set()

    def add(self, path: str, rows: int) -> None:
        """Counts the rows of one call. Logs the counts whenever the number of calls doubles: the
        processes that serve a model answer no questions, but their log can be read.
        """
        self.rows[path] += rows
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            counts = ", ".join(f"{name} {count}" for name, count in sorted(self.rows.items()))
            self._logger.info("MISA: rows so far: %s", counts)

    def takes(self, work: str, rows: int, reason: str | None) -> bool:
        """Counts rows of `work` (prefill or decode) as MISA's, or as the engine's if there is a
        reason, which is logged once. Returns whether they are MISA's.
        """
        if reason is not None and reason not in self._reasons:
            self._reasons.add(reason)
            self._logger.warning("MISA: %s left to the engine's own operator: %s", work, reason)
        self.add(f"{'misa' if reason is None else 'engine'}_{work}", rows)
        return reason is None
