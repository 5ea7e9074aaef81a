# SPDX-License-Identifier: Apache-2.0
"""Memory for what decode derives from keys, beside vLLM's caches, is taken out of what vLLM gives
to its caches: allocated after they are, it would come on top."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from typing import Any

from ._selector import PAGE

_WORKER = "vllm.v1.worker.gpu_worker"
_logger = logging.getLogger("vllm.misa")


def left(available: int, specs: Mapping[str, Any], index_bytes: int, derived_bytes: int) -> int:
    """Bytes of `available` for caches, if 64 tokens of an index cache, of `index_bytes` a token,
    need `derived_bytes` beside it. `specs` are vLLM's, by layer."""
    caches = sum(spec.page_size_bytes for spec in specs.values())
    tokens = sum(
        spec.block_size
        for spec in specs.values()
        if spec.page_size_bytes == spec.block_size * index_bytes
    )
    whole = caches * PAGE + tokens * derived_bytes
    return available * caches * PAGE // whole if caches else available


def reserve(index_bytes: int, derived_bytes: int) -> None:
    """Has vLLM leave room when it sizes its caches, unless their size is given
    (`kv_cache_memory_bytes`)."""
    worker = importlib.import_module(_WORKER).Worker
    determine = getattr(worker, "determine_available_memory", None)
    if determine is None:
        _logger.warning("MISA: no memory is set aside: this vLLM sizes its caches otherwise")
        return

    @functools.wraps(determine)
    def determine_available_memory(this: Any, *args: Any, **kwargs: Any) -> int:
        available = determine(this, *args, **kwargs)
        try:
            if this.cache_config.kv_cache_memory_bytes:
                return available
            specs = this.model_runner.get_kv_cache_spec()
            rest = left(available, specs, index_bytes, derived_bytes)
        except Exception as error:  # the engine starts all the same
            _logger.warning("MISA: no memory is set aside: %s: %s", type(error).__name__, error)
            return available
        _logger.info("MISA: %d MiB are set aside beside the caches", (available - rest) >> 20)
        return rest

    worker.determine_available_memory = determine_available_memory
