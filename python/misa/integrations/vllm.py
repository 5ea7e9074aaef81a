# SPDX-License-Identifier: Apache-2.0
"""MISA in vLLM: the plugin of the entry point group `vllm.general_plugins`.

vLLM selects the tokens of DSA models with one operator, `sparse_attn_indexer`, which it calls in
two ways: the layer `SparseAttnIndexer` goes through `torch.ops.vllm`, some model files call the
function. Both are replaced under the same name, at which vLLM's compiler splits its graphs. The
replacement selects from the bytes of the key cache, into vLLM's buffer, and calls vLLM's operator
for the rows that MISA does not select for. But for what decode derives from keys, which every step
writes, it has no state between steps, so prefix-cache hits, preemption and page reuse need no
handling.

docs/integrations/vllm.md says how to use it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

import misa

from ._counters import Counters
from ._environment import Settings, has, read_settings
from ._selector import PAGE, Bounds, Selector
from ._vllm_loads import Loads
from ._vllm_memory import reserve
from ._vllm_operator import Operator, text
from ._vllm_step import METADATA, UNREAD, Call

_MODULE = "vllm.model_executor.layers.sparse_attn_indexer"
_METADATA_MODULE = "vllm.v1.attention.backends.mla.indexer"
_OPERATOR = "sparse_attn_indexer"

# What is used besides: of the operator's module, and of vLLM's config.
_HELPERS = (
    "get_forward_context",
    "current_workspace_manager",
    "ops.cp_gather_indexer_k_quant_cache",
    "ops.indexer_k_quant_and_cache",
)
_CONFIG = (
    "model_config.hf_text_config",
    "model_config.max_model_len",
    "scheduler_config.max_num_batched_tokens",
    "scheduler_config.max_num_seqs",
    "speculative_config",
    "parallel_config",
)

_logger = logging.getLogger("vllm.misa")
_counters = Counters(_logger)
_registered = False
_decided = False
_library: torch.library.Library | None = None


def counters() -> dict[str, int]:
    """Rows of this process by the path that selected for them: misa_prefill, misa_decode,
    engine_prefill, engine_decode, counted in one layer of the model. A replayed CUDA graph counts
    too, with the rows that pad its batch. Waits for the device.
    """
    return _counters.rows


def register() -> None:
    """The entry point. Replaces vLLM's operator when a model with a sparse indexer is built, if the
    environment or the model's config names an indexer of MISA; otherwise does nothing.

    Raises:
        ValueError: a MISA_* variable that cannot be read.
    """
    global _registered
    read_settings()
    if _registered:
        return
    _registered = True
    layers = importlib.import_module("vllm.model_executor.custom_op")
    build = layers.CustomOp.__init__

    @functools.wraps(build)
    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        build(layer, *args, **kwargs)
        if any(base.__module__ == _MODULE for base in type(layer).__mro__):
            _install(importlib.import_module("vllm.config").get_current_vllm_config())

    layers.CustomOp.__init__ = init


def _install(config: Any) -> None:
    """Replaces the operator, once per process, if MISA is enabled and supports this vLLM.

    Raises:
        ValueError: a MISA_* variable that cannot be read, or an indexer unfit for the model.
        RuntimeError: MISA_STRICT is set, and MISA cannot do what was asked for.
    """
    global _decided, _library
    model = getattr(config.model_config, "hf_text_config", None)
    settings = read_settings(model)
    if _decided or settings is None:
        return
    chosen = settings.config_for(model)
    engine = importlib.import_module(_MODULE)
    platform = importlib.import_module("vllm.platforms").current_platform
    _decided = True
    try:
        problem = _problem(engine, config, platform)
        selector = None if problem else _selector(chosen, settings, config, platform)
    except Exception as error:  # of vLLM's functions too: without MISA it may start all the same
        problem = text(error)
    if problem:
        if settings.strict:
            raise RuntimeError(f"MISA_STRICT: expected MISA to be on, but {problem}")
        _logger.warning("MISA is off: %s", problem)
        return
    assert selector is not None
    _counters.prepare(selector.device)
    original = getattr(engine, _OPERATOR)
    # Where vLLM may deal rows to sequences on the device, a replay is not like its capture.
    indexer = importlib.import_module(_METADATA_MODULE)
    fixed = not hasattr(indexer, "_supports_flattened_device_query_lens")
    loads = None
    if selector.derives:
        reserve(selector.key_bytes, selector.derived_bytes)
    if selector.derives and getattr(config, "kv_transfer_config", None) is not None:
        loads = Loads(max(config.cache_config.block_size // PAGE, 1))
        loads.install()
    replacement = replace(
        original, engine, selector, strict=settings.strict, fixed=fixed, loads=loads
    )
    eager_break = getattr(engine, "eager_break_during_capture", None)
    if eager_break is not None:
        replacement = eager_break(replacement)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(_OPERATOR) is original:
            setattr(module, _OPERATOR, replacement)
    _library = torch.library.Library("vllm", "IMPL")
    _library.impl(_OPERATOR, replacement, platform.dispatch_key, allow_override=True)
    _logger.info(
        "MISA is on: %s selects for prefill%s (%s)",
        chosen,
        " and decode" if selector.decode else ", vLLM's operator for decode",
        selector.backend,
    )


def _problem(engine: Any, config: Any, platform: Any) -> str | None:
    """Why this vLLM on this machine cannot be served, or None."""
    parameters = inspect.signature(getattr(engine, _OPERATOR)).parameters
    read = [name for name in Call._fields if name not in Call._field_defaults]
    metadata = importlib.import_module(_METADATA_MODULE)
    missing = [f"argument {name}" for name in read if name not in parameters]
    missing += [f"function {name}" for name in _HELPERS if not has(engine, name)]
    missing += [f"setting {name}" for name in _CONFIG if not has(config, name)]
    if not hasattr(metadata, "get_max_prefill_buffer_size"):
        missing.append("function get_max_prefill_buffer_size")
    for name, fields in METADATA.items():
        known = getattr(getattr(metadata, name, None), "__dataclass_fields__", {})
        missing += [f"{name}.{field}" for field in fields if field not in known]
    if missing:
        return f"this vLLM has no {', '.join(missing)}"
    if platform.is_rocm() or platform.dispatch_key not in ("CUDA", "CPU"):
        return f"expected a CUDA device, got {platform.device_name or 'an unknown one'}"
    if platform.dispatch_key == "CUDA" and not any(
        backend.available and backend.name.startswith("cuda") for backend in misa.backends()
    ):
        return "misa was built without a CUDA backend for this device"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(config.parallel_config, name, 1) != 1:
            return f"{name} is {getattr(config.parallel_config, name)}"
    if getattr(config.parallel_config, "use_ubatching", False):
        return "two batches are overlapped, which would share one workspace"
    unknown = parameters.keys() - set(Call._fields) - UNREAD
    if unknown:
        _logger.warning(
            "MISA: arguments of vLLM's operator that are passed on to it unread: %s",
            ", ".join(sorted(unknown)),
        )
    return None


def _selector(chosen: misa.Config, settings: Settings, config: Any, platform: Any) -> Selector:
    """Plans for the largest step that vLLM may run."""
    model = config.model_config.hf_text_config
    scheduler = config.scheduler_config
    metadata = importlib.import_module(_METADATA_MODULE)
    rows, keys = scheduler.max_num_batched_tokens, config.model_config.max_model_len
    drafts = getattr(config.speculative_config, "num_speculative_tokens", 0) or 0
    decode = None
    if settings.decodes(chosen, model.index_n_heads):
        # A sequence that drafts may have a row of the block table for each of its queries.
        most = min(rows, scheduler.max_num_seqs * (drafts + 1))
        decode = Bounds(most, keys, sequences=most)
    cuda = platform.dispatch_key == "CUDA"
    selector = Selector(
        chosen,
        heads=model.index_n_heads,
        dim=model.index_head_dim,
        prefill=Bounds(rows, keys, total=metadata.get_max_prefill_buffer_size(config)),
        decode=decode,
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )
    if selector.derives and getattr(config, "kv_transfer_config", None) is not None:
        lacks = Loads.problem()
        if lacks is not None:
            problem = f"pages that a KV connector brings cannot be seen: {lacks}"
            if settings.strict:
                raise ValueError(problem)
            _counters.leave("decode", problem)
            selector.decode = None
    return selector


def replace(
    original: Callable[..., Any],
    engine: Any,
    selector: Selector,
    *,
    strict: bool = False,
    fixed: bool = False,
    loads: Loads | None = None,
) -> Callable[..., Any]:
    """An operator that selects with `selector` if it can and calls `original` for all other work.

    Args:
        original: vLLM's operator; of its arguments are read: q_quant [T, H, D] e4m3, weights
            [T, H] f32, kv_cache uint8 [pages, 64, D + 4], topk_indices_buffer int32
            [rows, columns] (columns >= topk_tokens), written in place.
        engine: the operator's module, for its helpers.
        selector: the plans for the model.
        strict: whether work that MISA cannot do is an error.
        fixed: whether all sequences of a captured decode have as many queries in every replay.
        loads: what sees the pages that a KV connector brings.
    """
    operator = Operator(original, engine, selector, _counters, strict, fixed)
    if loads is not None:
        loads.watcher = operator

    @functools.wraps(original)
    def sparse_attn_indexer(*args: Any, **kwargs: Any) -> torch.Tensor:
        return operator(args, kwargs)

    return sparse_attn_indexer
