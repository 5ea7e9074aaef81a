# SPDX-License-Identifier: Apache-2.0
"""MISA in SGLang: the plugin of the entry point group `sglang.srt.plugins`.

SGLang selects the tokens of DSA models in two methods of its `Indexer`: `_get_topk_ragged` for
prefill, on gathered keys, and `_get_topk_paged` for decode. Both are wrapped by SGLang's hooks. A
wrapper selects from the bytes of the key cache and converts positions to the form that the
attention backend expects; calls that it does not support go to SGLang's method. It has no state
between calls, so radix-cache hits, eviction and page reuse need no handling.

docs/integrations/sglang.md says how to use it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

import misa

from ._counters import Counters
from ._environment import Settings, has, read_settings
from ._selector import Bounds, Selector

_MODULE = "sglang.srt.layers.attention.dsa.dsa_indexer"
_PAGE = 64

# What the wrappers read; an SGLang that lacks any of it is not changed. Arguments of both methods,
# names of the indexer's module, methods and fields of its metadata, methods of the key pool.
_ARGUMENTS = ("forward_batch", "layer_id", "q_fp8", "weights", "metadata")
_HELPERS = ("get_token_to_kv_pool", "envs.SGLANG_DSA_FUSE_TOPK", "Indexer._get_index_k_read_buffer")
_METADATA = (
    "get_indexer_kvcache_range",
    "get_indexer_seq_len",
    "get_indexer_seq_len_cpu",
    "get_token_to_batch_idx",
    "get_dsa_extend_len_cpu",
    "get_seqlens_expanded",
    "get_page_table_64",
    "attn_metadata",
    "topk_transform_method",
    "force_unfused_topk",
)
_POOL = ("get_index_k_scale_buffer",)

_logger = logging.getLogger("sglang.srt.misa")
_counters = Counters(_logger)
_installed = False


def counters() -> dict[str, int]:
    """Rows of all layers of this process by the path that selected for them: misa_prefill,
    misa_decode, engine_prefill, engine_decode. Of replayed CUDA graphs MISA's rows are counted.
    Waits for the device.
    """
    return _counters.rows


def register() -> None:
    """The entry point. Hooks SGLang's indexer when the config of a model with a sparse indexer is
    read, if the environment or that config names an indexer of MISA; otherwise does nothing.
    """
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(
        "sglang.srt.configs.model_config.ModelConfig.__init__", _install, hooks.HookType.AFTER
    )


def _install(_result: None, model_config: Any, *_args: Any, **_kwargs: Any) -> None:
    """Hooks the indexer, once per process, if MISA is enabled and supports this SGLang.

    Raises:
        ValueError: a MISA_* variable that cannot be read, or an indexer unfit for the model.
        RuntimeError: SGLang did not hook one of the indexer's methods, or MISA_STRICT is set and
            MISA does not support this SGLang.
    """
    global _installed
    model = model_config.hf_text_config
    settings = read_settings(model)
    if _installed or settings is None or getattr(model, "index_topk", None) is None:
        return
    config = settings.config_for(model)
    engine = importlib.import_module(_MODULE)
    problem = _problem(engine, model)
    if problem is None and not hasattr(model_config, "context_len"):
        problem = "this SGLang's ModelConfig has no context_len"
    if problem and settings.strict:
        raise RuntimeError(f"MISA_STRICT: expected MISA to be on, but {problem}")
    if problem:
        _logger.warning("MISA is off: %s", problem)
        return
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooked = {
        "_get_topk_ragged": ragged(engine, settings),
        "_get_topk_paged": paged(engine, settings, model_config.context_len),
    }
    unhooked = {method: getattr(engine.Indexer, method) for method in hooked}
    for method, hook in hooked.items():
        hooks.HookRegistry.register(f"{_MODULE}.Indexer.{method}", hook, hooks.HookType.AROUND)
    hooks.HookRegistry.apply_hooks()
    # The registry only logs a failure, and skips a method that it has hooked before.
    missing = [m for m, method in unhooked.items() if getattr(engine.Indexer, m) is method]
    if missing:
        raise RuntimeError(
            f"MISA: expected SGLang to hook {' and '.join(missing)} of its indexer, got no hook: "
            "SGLang's log says why, or another plugin of SGLANG_PLUGINS hooked it first"
        )
    _installed = True
    _logger.info(
        "MISA is on: %s selects for prefill%s",
        config,
        " and decode" if settings.decode else ", SGLang's indexer for decode",
    )


def _problem(engine: Any, model: Any) -> str | None:
    """Why this model in this SGLang on this machine cannot be served, or None."""
    if (getattr(model, "index_kpool", None) or 1) != 1:
        return "pooled index keys"  # SGLang has another indexer for them
    missing = []
    for method in ("_get_topk_ragged", "_get_topk_paged"):
        parameters = inspect.signature(getattr(engine.Indexer, method)).parameters
        missing += [f"{method}({name})" for name in _ARGUMENTS if name not in parameters]
    missing += [name for name in _HELPERS if not has(engine, name)]
    metadata = importlib.import_module(f"{_MODULE}_metadata").DSAIndexerMetadata
    missing += [f"DSAIndexerMetadata.{name}" for name in _METADATA if not has(metadata, name)]
    pool = importlib.import_module("sglang.srt.mem_cache.memory_pool").DSATokenToKVPool
    missing += [f"DSATokenToKVPool.{name}" for name in _POOL if not has(pool, name)]
    if missing:
        return f"this SGLang has no {', '.join(missing)}"
    if torch.version.hip is not None:
        return "expected a CUDA device, got a ROCm one"
    if torch.cuda.is_available() and not any(
        backend.available and backend.name.startswith("cuda") for backend in misa.backends()
    ):
        return "misa was built without a CUDA backend for this device"
    return None


def ragged(engine: Any, settings: Settings) -> Callable[..., torch.Tensor]:
    """A hook around `Indexer._get_topk_ragged`: prefill on the keys that the pool gathers.

    It reads q_fp8 [rows, H, D] e4m3 and weights [rows, H, 1] f32; rows beyond those of the metadata
    are padding and get -1. It returns int32 [rows, index_topk], in `topk_result` if that is given.

    Args:
        engine: the indexer's module, for its helpers.
        settings: the indexer.
    """
    signature = inspect.signature(engine.Indexer._get_topk_ragged)

    def hook(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        indexer, metadata, q = call["self"], call["metadata"], call["q_fp8"]
        ks, ke = metadata.get_indexer_kvcache_range()
        rows = ks.shape[0]
        pool = engine.get_token_to_kv_pool()
        reason = _failed.get("prefill") or _uncovered(indexer, call["forward_batch"], q, pool)
        capturing = _capturing(q)
        if capturing:
            reason = "CUDA graph capture"
        if reason is not None:
            return _left("prefill", rows, capturing, reason, original, args, kwargs)
        result = call.get("topk_result")
        if result is None:
            result = q.new_full((q.shape[0], indexer.index_topk), -1, dtype=torch.int32)
        if rows == 0:
            return result
        # The table that the pool gathers by has this name where pages may be split among ranks.
        table = getattr(metadata, "get_logical_page_table", metadata.get_page_table_64)()
        lengths = metadata.get_indexer_seq_len_cpu()
        try:
            k, scale = pool.get_index_k_scale_buffer(
                call["layer_id"],
                metadata.get_indexer_seq_len(),
                table,
                int(lengths.sum()),
                int(lengths.max()),
            )
            selected = misa.select(
                q[:rows],
                call["weights"][:rows].squeeze(-1),
                k.view(torch.float8_e4m3fn),
                ks,
                ke,
                k_scale=scale.view(torch.float32).squeeze(-1),
                config=settings.config(indexer.index_topk),
            )
            requests = metadata.get_token_to_batch_idx()
            result[:rows] = _converted(selected.indices, metadata, engine, requests)
        except _ERRORS as error:
            return _fallen("prefill", rows, capturing, error, original, args, kwargs)
        _counters.add("misa_prefill", rows)
        return result

    return hook


# What MISA raises where it cannot do a call; the work is SGLang's from then on.
_ERRORS = (AttributeError, MemoryError, RuntimeError, TypeError, ValueError)
_failed: dict[str, str] = {}


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _left(
    work: str,
    rows: int,
    capturing: bool,
    reason: str,
    original: Callable[..., torch.Tensor],
    args: tuple,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Counts and says why a call is SGLang's, and makes it. A captured one is not counted."""
    _counters.leave(work, reason)
    if not capturing:
        _counters.add(f"engine_{work}", rows)
    return original(*args, **kwargs)


def _fallen(work: str, rows: int, capturing: bool, error: Exception, *call: Any) -> torch.Tensor:
    """Leaves this and all later calls to SGLang."""
    _failed[work] = f"{type(error).__name__}: {error}"
    return _left(work, rows, capturing, _failed[work], *call)


class _DecodePlans:
    """The plans for decode, for the most rows so far. They are made before a batch of that size is
    captured, as SGLang runs it first; captured graphs keep the memory of older ones in use.
    """

    def __init__(self, settings: Settings, context: int) -> None:
        self._settings = settings
        self._keys = context + _PAGE  # drafts may lie behind the context
        self._made: list[Selector] = []

    def of(self, q: torch.Tensor, rows: int, top_k: int) -> Selector:
        """For `rows` of q [T, H, D]."""
        if not self._made or rows > self._most:
            if _capturing(q):
                raise RuntimeError(f"{rows} rows in a CUDA graph before any other batch of so many")
            _counters.prepare(q.device)
            config = self._settings.config(top_k)
            if config.sketch:
                raise RuntimeError("SGLang's pool has no sketches")
            most = 1 << (rows - 1).bit_length()
            selector = Selector(
                config,
                heads=q.shape[1],
                dim=q.shape[2],
                prefill=Bounds(1, self._keys, total=self._keys),
                decode=Bounds(most, self._keys, sequences=most),
                device=q.device,
            )
            self._made.append(selector)
        return self._made[-1]

    @property
    def _most(self) -> int:
        bounds = self._made[-1].decode
        return min(bounds.rows, bounds.sequences) if bounds else 0


def paged(engine: Any, settings: Settings, context: int) -> Callable[..., torch.Tensor]:
    """A hook around `Indexer._get_topk_paged`: decode, verification and draft extension, one row of
    the page table per query. Without MISA_DECODE it calls SGLang's method.

    It reads q_fp8 [rows, H, D] e4m3 and weights [rows, H, 1] f32, and returns int32
    [rows, index_topk]; padding rows are -1. A call may be captured into a CUDA graph.

    Args:
        engine: the indexer's module, for its helpers.
        settings: the indexer.
        context: the longest sequence.
    """
    signature = inspect.signature(engine.Indexer._get_topk_paged)
    plans = _DecodePlans(settings, context)

    def hook(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        call = bound.arguments
        indexer, metadata, q = call["self"], call["metadata"], call["q_fp8"]
        rows = sum(metadata.get_dsa_extend_len_cpu())
        capturing = _capturing(q)
        if not settings.decode:
            if not capturing:
                _counters.add("engine_decode", rows)
            return original(*args, **kwargs)
        if "decode" in _failed:
            return _left("decode", rows, capturing, _failed["decode"], original, args, kwargs)
        try:
            lengths, table = metadata.get_seqlens_expanded(), metadata.get_page_table_64()
            pool = engine.get_token_to_kv_pool()
            reason = _uncovered(indexer, call["forward_batch"], q, pool)
            if reason is None and not lengths.shape[0] == table.shape[0] == rows:
                reason = "sequences that share a row of the page table"
            if reason is not None:
                return _left("decode", rows, capturing, reason, original, args, kwargs)
            result = q.new_full((q.shape[0], indexer.index_topk), -1, dtype=torch.int32)
            if rows == 0:
                return result
            cache = indexer._get_index_k_read_buffer(pool, call["layer_id"])
            fused = engine.envs.SGLANG_DSA_FUSE_TOPK.get() and not metadata.force_unfused_topk
            slots = fused and metadata.topk_transform_method.name == "PAGED"
            plans.of(q, rows, indexer.index_topk).paged(
                q[:rows],
                call["weights"][:rows].squeeze(-1),
                cache,
                table,
                lengths,
                result[:rows],
                slots=slots,
            )
            if not slots:
                result[:rows] = _converted(result[:rows], metadata, engine, None)
        except _ERRORS as error:
            return _fallen("decode", rows, capturing, error, original, args, kwargs)
        _counters.add("misa_decode", rows, capturing)
        return result

    return hook


def _uncovered(indexer: Any, batch: Any, q: torch.Tensor, pool: Any) -> str | None:
    """Why this call must be left to SGLang's method, or None."""
    if q.dtype != torch.float8_e4m3fn:
        return f"queries in {q.dtype}"
    page = getattr(pool, "index_page_size", None) or getattr(pool, "page_size", None)
    if page != _PAGE:
        return f"index pages of {page} tokens"
    if getattr(pool, "index_kpool", 1) != 1:
        return "pooled index keys"
    if getattr(indexer, "num_init_tokens", 0) or getattr(indexer, "num_local_tokens", 0):
        return "tokens that are always selected"
    if getattr(batch, "attn_cp_metadata", None) is not None:
        return "context parallelism"
    return None


def _converted(
    positions: torch.Tensor, metadata: Any, engine: Any, requests: torch.Tensor | None
) -> torch.Tensor:
    """Positions int32 [rows, top_k] in the form that the attention backend expects; -1 stays -1.

    Unchanged if SGLang does not fuse top-k with the next step, otherwise slots of the page table
    (PAGED) or indices into the gathered keys (RAGGED). `requests` [rows] is each row's request, or
    None if each row has its own row of the page table.
    """
    if not engine.envs.SGLANG_DSA_FUSE_TOPK.get() or metadata.force_unfused_topk:
        return positions
    attention = metadata.attn_metadata
    if metadata.topk_transform_method.name == "RAGGED":
        places = positions + attention.topk_indices_offset[: positions.shape[0], None]
    else:
        table, size = attention.real_page_table, attention.page_size
        if requests is None:
            requests = torch.arange(positions.shape[0], device=positions.device)
        pages = table[requests.long()[:, None], (positions.clamp(min=0) // size).long()]
        places = pages * size + positions.clamp(min=0) % size
    return torch.where(positions < 0, positions, places)
