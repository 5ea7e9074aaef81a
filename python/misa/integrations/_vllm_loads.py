# SPDX-License-Identifier: Apache-2.0
"""Pages of vLLM's caches whose keys a KV connector brings: offloaded ones that come back, and those
of other instances. No step of this engine writes them, so what decode derives from keys is made
from them when a request with such pages is first scheduled."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol

_WORKER = "vllm.v1.worker.gpu_worker"
_TRANSFER = "vllm.distributed.kv_transfer"
_SCHEDULED = "vllm.v1.core.sched.output"

# The fields that are read, by their class.
_FIELDS = {
    "SchedulerOutput": ("scheduled_new_reqs", "scheduled_cached_reqs"),
    "NewRequestData": ("block_ids", "num_computed_tokens"),
    "CachedRequestData": ("req_ids", "resumed_req_ids", "new_block_ids", "num_computed_tokens"),
}


class Watcher(Protocol):
    """Who is told of pages."""

    def rebuild(self, pages: list[int]) -> None:
        """The keys of some pages are there."""

    def lose(self, error: Exception) -> None:
        """There may be keys of unknown pages."""


class Loads:
    """Calls `rebuild` of its watcher with the pages of each request that begins with tokens that
    are computed, or `lose` if they cannot be told.

    Which of them a connector brought is its own business; to make the others again changes nothing.
    A connector that loads in the background has ended before the request is scheduled; one that
    loads within the step does so in `start_load_kv`. So `rebuild` is called before the step and
    after that.
    """

    def __init__(self, pages_per_block: int) -> None:
        self.watcher: Watcher | None = None
        self._pages_per_block = pages_per_block
        self._pages: list[int] = []
        self._watched: Any = None

    @staticmethod
    def problem() -> str | None:
        """What this vLLM lacks, or None."""
        scheduled = importlib.import_module(_SCHEDULED)
        missing = []
        for name, fields in _FIELDS.items():
            known = getattr(getattr(scheduled, name, None), "__dataclass_fields__", {})
            missing += [f"{name}.{field}" for field in fields if field not in known]
        if not hasattr(importlib.import_module(_TRANSFER), "get_kv_transfer_group"):
            missing.append("function get_kv_transfer_group")
        return f"this vLLM has no {', '.join(missing)}" if missing else None

    def install(self) -> None:
        """Sees every step of this process from now on."""
        worker = importlib.import_module(_WORKER).Worker
        transfer = importlib.import_module(_TRANSFER)
        run = worker.execute_model

        @functools.wraps(run)
        def execute_model(this: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                self._pages = self.pages(scheduler_output)
                if self._pages:
                    self._watch(transfer.get_kv_transfer_group())
            except Exception as error:
                self._pages = []
                if self.watcher is not None:
                    self.watcher.lose(error)
            self._rebuild()
            return run(this, scheduler_output, *args, **kwargs)

        worker.execute_model = execute_model

    def pages(self, scheduled: Any) -> list[int]:
        """Of requests that begin, or begin again, in this step with tokens that are computed."""
        groups = [r.block_ids for r in scheduled.scheduled_new_reqs if r.num_computed_tokens]
        again = scheduled.scheduled_cached_reqs
        if again.resumed_req_ids:
            rows = zip(again.req_ids, again.new_block_ids, again.num_computed_tokens, strict=True)
            groups += [ids for name, ids, count in rows if count and name in again.resumed_req_ids]
        each = range(self._pages_per_block)
        blocks = {block for ids in groups for group in ids or () for block in group}
        return sorted(block * len(each) + i for block in blocks for i in each)

    def _watch(self, connector: Any) -> None:
        if connector is self._watched:
            return
        self._watched = connector
        load = connector.start_load_kv

        @functools.wraps(load)
        def start_load_kv(*args: Any, **kwargs: Any) -> None:
            load(*args, **kwargs)
            self._rebuild()

        connector.start_load_kv = start_load_kv

    def _rebuild(self) -> None:
        if self._pages and self.watcher is not None:
            self.watcher.rebuild(self._pages)
