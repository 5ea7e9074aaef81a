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

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

import misa

from ._counters import Counters
from ._environment import Settings, has, read_settings
from ._selector import PAGE, Bounds, Selector

_ATTENTION = "sglang.srt.layers.attention"
_MODULE = f"{_ATTENTION}.dsa.dsa_indexer"

# What the wrappers read; an SGLang that lacks any of it is not changed. Arguments of both methods,
# names of the indexer's module, and methods and fields of classes by where these are. What an
# instance has of its own are arguments of its class.
_ARGUMENTS = ("forward_batch", "layer_id", "q_fp8", "weights", "metadata")
_HELPERS = ("get_token_to_kv_pool", "envs.SGLANG_DSA_FUSE_TOPK", "Indexer._get_index_k_read_buffer")
_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "DSAIndexerMetadata": (
        f"{_MODULE}_metadata",
        (
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
        ),
    ),
    "DSAMetadata": (
        f"{_ATTENTION}.dsa_backend",
        ("real_page_table", "page_size", "topk_indices_offset"),
    ),
    "TopkTransformMethod": (f"{_ATTENTION}.dsa.dsa_topk_backend", ("PAGED", "RAGGED")),
    "DSATokenToKVPool": ("sglang.srt.mem_cache.memory_pool", ("get_index_k_scale_buffer",)),
}
_INITIAL = {"Indexer": ("index_topk",), "DSATokenToKVPool": ("page_size",)}

_logger = logging.getLogger("sglang.srt.misa")
_counters = Counters(_logger)
_installed = False
_counted: Any = None  # the indexer of the layer in which rows are counted
_failed: dict[str, str] = {}  # why "prefill" or "decode" is SGLang's from now on


def counters() -> dict[str, int]:
    """Rows of this process by the path that selected for them: misa_prefill, misa_decode,
    engine_prefill, engine_decode, counted in one layer of the model. A replayed CUDA graph counts
    too, with the rows that pad its batch. Waits for the device.
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
            MISA cannot do what was asked for.
    """
    global _installed
    model = model_config.hf_text_config
    settings = read_settings(model)
    if _installed or settings is None or getattr(model, "index_topk", None) is None:
        return
    config = settings.config_for(model)
    engine = importlib.import_module(_MODULE)
    try:
        problem = _problem(engine, model)
    except Exception as error:  # of SGLang's modules too: without MISA it may start all the same
        problem = _text(error)
    if problem is None and not hasattr(model_config, "context_len"):
        problem = "this SGLang's ModelConfig has no context_len"
    if problem and settings.strict:
        raise RuntimeError(f"MISA_STRICT: expected MISA to be on, but {problem}")
    if problem:
        _logger.warning("MISA is off: %s", problem)
        return
    if settings.decode and config.sketch:
        settings = _without_decode(settings, "SGLang's pool has no sketches")
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooked = {
        "_get_topk_ragged": ragged(engine, settings, model_config.context_len),
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
    classes = {"Indexer": engine.Indexer}
    for kind, (module, names) in _CLASSES.items():
        classes[kind] = getattr(importlib.import_module(module), kind, None)
        missing += [f"{kind}.{name}" for name in names if not has(classes[kind], name)]
    for kind, names in _INITIAL.items():
        arguments = inspect.signature(classes[kind]).parameters if classes[kind] else {}
        missing += [f"{kind}({name})" for name in names if name not in arguments]
    if missing:
        return f"this SGLang has no {', '.join(missing)}"
    if torch.version.hip is not None:
        return "expected a CUDA device, got a ROCm one"
    if torch.cuda.is_available() and not any(
        backend.available and backend.name.startswith("cuda") for backend in misa.backends()
    ):
        return "misa was built without a CUDA backend for this device"
    return None


def _without_decode(settings: Settings, problem: str) -> Settings:
    if settings.strict:
        raise RuntimeError(f"MISA_STRICT: expected MISA to decode, but {problem}")
    _counters.leave("decode", problem)
    return dataclasses.replace(settings, decode=False)


def ragged(engine: Any, settings: Settings, context: int) -> Callable[..., torch.Tensor]:
    """A hook around `Indexer._get_topk_ragged`: prefill on the keys that the pool gathers.

    It reads q_fp8 [rows, H, D] e4m3 and weights [rows, H, 1] f32; rows beyond those of the metadata
    are padding and get -1. It returns int32 [rows, index_topk], in `topk_result` if that is given.

    Args:
        engine: the indexer's module, for its helpers.
        settings: the indexer.
        context: the longest sequence.
    """
    plans = _Plans(settings, context)

    def rows_of(metadata: Any) -> int:
        return metadata.get_indexer_kvcache_range()[0].shape[0]

    def select(call: dict[str, Any], rows: int, capturing: bool) -> torch.Tensor | str | None:
        if capturing:
            return "a CUDA graph of a prefill"
        indexer, metadata, q = call["self"], call["metadata"], call["q_fp8"]
        ks, ke = metadata.get_indexer_kvcache_range()
        pool = engine.get_token_to_kv_pool()
        reason = _uncovered(indexer, call["forward_batch"], q, pool)
        if reason is not None:
            return reason
        result = call.get("topk_result")
        if result is None:
            result = q.new_full((q.shape[0], indexer.index_topk), -1, dtype=torch.int32)
        if rows == 0:
            return result
        # The table that the pool gathers by has this name where pages may be split among ranks.
        table = getattr(metadata, "get_logical_page_table", metadata.get_page_table_64)()
        lengths = metadata.get_indexer_seq_len_cpu()
        keys = int(lengths.sum())
        selector = plans.ragged(q, rows, keys, indexer.index_topk)
        if selector is None:
            return f"{rows} rows on {keys} keys, more than can be planned for"
        k, scale = pool.get_index_k_scale_buffer(
            call["layer_id"], metadata.get_indexer_seq_len(), table, keys, int(lengths.max())
        )
        selector.ragged(
            q[:rows],
            call["weights"][:rows].squeeze(-1),
            k,
            ks,
            ke,
            scale.view(torch.float32).squeeze(-1),
            result[:rows],
        )
        requests = metadata.get_token_to_batch_idx()
        result[:rows] = _converted(result[:rows], metadata, engine, requests)
        return result

    return _around(engine, "_get_topk_ragged", "prefill", settings, rows_of, select)


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
    plans = _Plans(settings, context)

    def rows_of(metadata: Any) -> int:
        return sum(metadata.get_dsa_extend_len_cpu())

    def select(call: dict[str, Any], rows: int, capturing: bool) -> torch.Tensor | str | None:
        if not settings.decode:
            return None
        indexer, metadata, q = call["self"], call["metadata"], call["q_fp8"]
        lengths, table = metadata.get_seqlens_expanded(), metadata.get_page_table_64()
        pool = engine.get_token_to_kv_pool()
        reason = _uncovered(indexer, call["forward_batch"], q, pool)
        if reason is None and not lengths.shape[0] == table.shape[0] == rows:
            reason = "sequences that share a row of the page table"
        if reason is not None:
            return reason
        result = q.new_full((q.shape[0], indexer.index_topk), -1, dtype=torch.int32)
        if rows == 0:
            return result
        selector = plans.paged(q, rows, indexer.index_topk, capturing)
        if selector is None:
            return f"{rows} rows, more than can be planned for"
        cache = indexer._get_index_k_read_buffer(pool, call["layer_id"])
        fused = engine.envs.SGLANG_DSA_FUSE_TOPK.get() and not metadata.force_unfused_topk
        slots = fused and metadata.topk_transform_method.name == "PAGED"
        weights = call["weights"][:rows].squeeze(-1)
        selector.paged(q[:rows], weights, cache, table, lengths, result[:rows], slots=slots)
        if not slots:
            result[:rows] = _converted(result[:rows], metadata, engine, None)
        return result

    return _around(engine, "_get_topk_paged", "decode", settings, rows_of, select)


def _around(
    engine: Any,
    method: str,
    work: str,
    settings: Settings,
    rows_of: Callable[[Any], int],
    select: Callable[[dict[str, Any], int, bool], torch.Tensor | str | None],
) -> Callable[..., torch.Tensor]:
    """A hook around a method of the indexer. An error leaves this and all later calls to SGLang.

    Args:
        rows_of: how many rows a call of this metadata has, without padding.
        select: of the arguments by name, the rows and whether they are captured, what the method
            returns; or why SGLang has to select, or None if nothing else was asked for.
    """
    signature = inspect.signature(getattr(engine.Indexer, method))

    def hook(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        q = call["q_fp8"]
        rows, capturing = q.shape[0], _capturing(q)
        result: torch.Tensor | str | None = _failed.get(work)
        cause = None
        try:
            rows = rows_of(call["metadata"])
            if result is None:
                result = select(call, rows, capturing)
        except Exception as error:
            cause, result = error, _text(error)
            _failed[work] = result
        if isinstance(result, str):
            if settings.strict:
                problem = f"MISA_STRICT: expected MISA to select for {work}, but {result}"
                raise RuntimeError(problem) from cause
            _counters.leave(work, result)
        if isinstance(result, torch.Tensor):
            _count(call["self"], f"misa_{work}", rows, capturing, q.device)
            return result
        _count(call["self"], f"engine_{work}", rows, capturing, q.device)
        return original(*args, **kwargs)

    return hook


def _count(indexer: Any, path: str, rows: int, capturing: bool, device: torch.device) -> None:
    global _counted
    _counted = indexer if _counted is None else _counted
    if indexer is _counted:
        if not capturing:
            _counters.prepare(device)
        _counters.add(path, rows, capturing)


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _power(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


class _Plans:
    """A selector for one of the two methods, for the largest calls so far. Its bounds are powers of
    two, so that few are ever made.

    One for decode is made before a batch of its size is captured, as SGLang runs it first. Graphs
    use the memory of one that was captured, which stays; any other goes when a larger one comes.
    """

    def __init__(self, settings: Settings, context: int) -> None:
        self._settings = settings
        self._keys = context + PAGE  # drafts may lie behind the context
        self._asked = Bounds(0, self._keys)
        self._made: Selector | None = None
        self._captured: list[Selector] = []

    def ragged(self, q: torch.Tensor, rows: int, keys: int, top_k: int) -> Selector | None:
        """For `rows` of q [T, H, D] on `keys`; None if there is not enough memory for the keys."""
        asked = self._asked
        if rows > asked.rows or keys > asked.total:
            most, total = max(asked.rows, _power(rows)), max(asked.total, _power(keys), self._keys)
            self._make(q, top_k, Bounds(most, self._keys, total))
        made = self._made
        return made if made is not None and keys <= made.prefill.total else None

    def paged(self, q: torch.Tensor, rows: int, top_k: int, capturing: bool) -> Selector | None:
        """For `rows` of q [T, H, D]; None if there is not enough memory for so many."""
        if rows > self._asked.rows:
            if capturing:
                raise RuntimeError(f"{rows} rows in a CUDA graph before any other batch of so many")
            most = _power(rows)
            self._make(q, top_k, Bounds(most, self._keys, sequences=most))
        made = self._made
        if made is None or made.decode is None or rows > made.decode.sequences:
            return None
        if capturing and made not in self._captured:
            self._captured.append(made)
        return made

    def _make(self, q: torch.Tensor, top_k: int, asked: Bounds) -> None:
        if self._made is not None and q.is_cuda:
            torch.cuda.synchronize(q.device)  # another stream may still use its memory
        self._asked, self._made = asked, None
        self._made = Selector(
            self._settings.config(top_k),
            heads=q.shape[1],
            dim=q.shape[2],
            prefill=Bounds(1, self._keys, self._keys) if asked.sequences else asked,
            decode=asked if asked.sequences else None,
            device=q.device,
        )


def _uncovered(indexer: Any, batch: Any, q: torch.Tensor, pool: Any) -> str | None:
    """Why this call must be left to SGLang's method, or None."""
    if q.dtype != torch.float8_e4m3fn:
        return f"queries in {q.dtype}"
    page = getattr(pool, "index_page_size", None) or getattr(pool, "page_size", None)
    if page != PAGE:
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
