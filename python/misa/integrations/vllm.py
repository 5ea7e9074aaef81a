# SPDX-License-Identifier: Apache-2.0
"""MISA in vLLM: the plugin of the entry point group `vllm.general_plugins`.

vLLM selects the tokens of DSA models with one operator, `sparse_attn_indexer`, which it calls in
two ways: the layer `SparseAttnIndexer` goes through `torch.ops.vllm`, some model files call the
function. Both are replaced under the same name, at which vLLM's compiler splits its graphs. The
replacement calls vLLM's operator for the work that MISA does not do (inserting keys, filling the
buffer, decode) and selects for the other rows from the bytes of the key cache. It has no state
between calls, so prefix-cache hits, preemption and page reuse need no handling.

docs/integrations/vllm.md says how to use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

import misa

from ._counters import Counters
from ._environment import Settings, read_settings

_MODULE = "vllm.model_executor.layers.sparse_attn_indexer"
_OPERATOR = "sparse_attn_indexer"
_PAGE = 64

# The operator's arguments and the names of its module that the replacement uses; a vLLM that lacks
# one of them is not changed.
_ARGUMENTS = (
    "k_cache_prefix",
    "kv_cache",
    "q_quant",
    "weights",
    "topk_tokens",
    "head_dim",
    "total_seq_lens",
    "topk_indices_buffer",
)
_HELPERS = ("get_forward_context", "current_workspace_manager", "ops")

# Arguments that change the selection unless they have this value.
_PLAIN = {"use_fp4_cache": False, "use_pcp": False, "dcp_world_size": 1, "candidate_blocks": None}

# Arguments that the replacement knows and passes on.
_PASSED_ON = {
    "hidden_states",
    "q_scale",
    "k",
    "quant_block_size",
    "scale_fmt",
    "max_model_len",
    "skip_k_cache_insert",
    "pcp_shard_decode_requests",
    "dense_mha_metadata_layer_name",
    "dcp_rank",
    "cp_kv_cache_interleave_size",
    "skip_topk_buffer_clear",
    "candidate_block_size",
    "candidate_write",
    "topk_backend",
}

_logger = logging.getLogger("vllm.misa")
_counters = Counters(_logger)
_registered = False
_library: torch.library.Library | None = None


def counters() -> dict[str, int]:
    """Rows of this process by the path that selected for them: misa_prefill, misa_decode,
    engine_prefill, engine_decode. Rows of replayed CUDA graphs are not counted.
    """
    return dict(_counters.rows)


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
            _install(importlib.import_module("vllm.config").get_current_vllm_config().model_config)

    layers.CustomOp.__init__ = init


def _install(model_config: Any) -> None:
    """Replaces the operator, once per process, if MISA is enabled and supports this vLLM.

    Raises:
        ValueError: a MISA_* variable that cannot be read, or an indexer unfit for the model.
    """
    global _library
    model = getattr(model_config, "hf_text_config", None)
    settings = read_settings(model)
    if _library is not None or settings is None:
        return
    config = settings.config_for(model)
    engine = importlib.import_module(_MODULE)
    platform = importlib.import_module("vllm.platforms").current_platform
    problem = _problem(engine, platform)
    if problem:
        _logger.warning("MISA is off: %s", problem)
        return
    original = getattr(engine, _OPERATOR)
    replacement = replace(original, engine, settings)
    eager_break = getattr(engine, "eager_break_during_capture", None)
    if eager_break is not None:
        replacement = eager_break(replacement)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(_OPERATOR) is original:
            setattr(module, _OPERATOR, replacement)
    _library = torch.library.Library("vllm", "IMPL")
    _library.impl(_OPERATOR, replacement, platform.dispatch_key, allow_override=True)
    _logger.info(
        "MISA is on: %s selects for prefill%s",
        config,
        " and decode" if settings.decode else ", vLLM's operator for decode",
    )


def _problem(engine: Any, platform: Any) -> str | None:
    """Why this vLLM on this machine cannot be served, or None."""
    parameters = inspect.signature(getattr(engine, _OPERATOR)).parameters
    missing = [name for name in _ARGUMENTS if name not in parameters]
    missing += [name for name in _HELPERS if not hasattr(engine, name)]
    if missing:
        return f"this vLLM's operator has no {', '.join(missing)}"
    if platform.is_rocm() or platform.dispatch_key not in ("CUDA", "CPU"):
        return f"expected a CUDA device, got {platform.device_name or 'an unknown one'}"
    if platform.dispatch_key == "CUDA" and not any(
        backend.available and backend.name.startswith("cuda") for backend in misa.backends()
    ):
        return "misa was built without a CUDA backend for this device"
    unknown = parameters.keys() - set(_ARGUMENTS) - _PLAIN.keys() - _PASSED_ON
    if unknown:
        _logger.warning(
            "MISA: arguments of vLLM's operator that are passed on to it unread: %s",
            ", ".join(sorted(unknown)),
        )
    return None


def replace(original: Callable[..., Any], engine: Any, settings: Settings) -> Callable[..., Any]:
    """An operator that selects with `settings` if it can and calls `original` for all other work.

    Args:
        original: vLLM's operator. Arguments are bound by its signature; the ones read here are
            q_quant [T, H, D] e4m3, weights [T, H] f32, kv_cache uint8 [pages, 64, D + 4],
            topk_indices_buffer int32 [rows, columns] (columns >= topk_tokens), written in place.
        engine: the operator's module, for its helpers.
        settings: the indexer.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def sparse_attn_indexer(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        context = engine.get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # a profiling run
            return original(*args, **kwargs)
        layer = _layer_name(call.k_cache_prefix)
        metadata = context.attn_metadata[layer]
        prefill = metadata.num_prefill_tokens if metadata.num_prefills > 0 else 0
        decode = metadata.num_decode_tokens if metadata.num_decodes > 0 else 0
        reason = _uncovered(call, context, engine)
        taken: dict[str, Any] = {}
        if prefill and _counters.misa_selects("prefill", prefill, reason):
            taken.update(num_prefills=0, prefill=None)
        if decode and not settings.decode:
            _counters.add("engine_decode", decode)
        elif decode and _counters.misa_selects(
            "decode", decode, reason or _uncovered_decode(metadata.decode, decode)
        ):
            taken.update(num_decodes=0, decode=None)
        if not taken:
            return original(*args, **kwargs)
        with _metadata(context, layer, dataclasses.replace(metadata, **taken)):
            original(*args, **kwargs)
        config = settings.config(call.topk_tokens)
        if "prefill" in taken:
            _select_prefill(call, metadata, config, engine)
        if "decode" in taken:
            _select_decode(call, metadata, config)
        return call.topk_indices_buffer

    return sparse_attn_indexer


def _layer_name(name: Any) -> str:
    """vLLM passes a layer's name as a string or in an object that its compiler can trace."""
    return getattr(name, "value", name)


def _uncovered(call: SimpleNamespace, context: Any, engine: Any) -> str | None:
    """Why this call must be left to vLLM's operator, or None."""
    for name, plain in _PLAIN.items():
        value = getattr(call, name, plain)
        if isinstance(value, torch.Tensor) or value != plain:
            return f"{name} is set"
    if call.q_quant.dtype != torch.float8_e4m3fn:
        return f"queries in {call.q_quant.dtype}"
    if tuple(call.kv_cache.shape[1:]) != (_PAGE, call.head_dim + 4):
        return f"a key cache of shape {tuple(call.kv_cache.shape)}"
    if getattr(engine, "mqa_logits_use_mx_scales", bool)():
        return "key scales in MX format"
    if _capturing(call.q_quant):
        return "CUDA graph capture"
    attention = context.attn_metadata.get(
        _layer_name(getattr(call, "dense_mha_metadata_layer_name", ""))
    )
    if getattr(getattr(attention, "prefill", None), "use_dense_mha", False):
        return "attention is dense, and asks for no positions"
    return None


def _uncovered_decode(decode: Any, rows: int) -> str | None:
    """Why these decode rows must be left to vLLM's operator, or None."""
    if decode.requires_padding or decode.seq_lens.numel() != rows:
        return "sequences that decode unequal numbers of tokens"
    return None


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _metadata(context: Any, layer: str, metadata: Any) -> Iterator[None]:
    """Gives vLLM's operator another metadata object for one layer."""
    whole = context.attn_metadata
    context.attn_metadata = {**whole, layer: metadata}
    try:
        yield
    finally:
        context.attn_metadata = whole


def _select_prefill(call: SimpleNamespace, metadata: Any, config: misa.Config, engine: Any) -> None:
    """Selects for the prefill rows, chunk by chunk. vLLM gathers the keys into its workspace for
    them; chunks of the same requests share them.
    """
    keys, scales = engine.current_workspace_manager().get_simultaneous(
        ((call.total_seq_lens, call.head_dim), torch.float8_e4m3fn),
        ((call.total_seq_lens, 4), torch.uint8),
    )
    # Each rank of a tensor-parallel group may select for only a part of the rows.
    shards = getattr(engine, "PrefillRowShard", None)
    shard = shards and shards.from_metadata(metadata.prefill, metadata.num_decode_tokens)
    for chunk in metadata.prefill.chunks:
        k, scale = keys[: chunk.total_seq_lens], scales[: chunk.total_seq_lens]
        if not getattr(chunk, "skip_kv_gather", False):
            engine.ops.cp_gather_indexer_k_quant_cache(
                call.kv_cache, k, scale, chunk.block_table, chunk.cu_seq_lens
            )
        rows = (chunk.token_start, chunk.token_end, chunk.cu_seqlen_ks, chunk.cu_seqlen_ke)
        if shard is not None:
            rows = shard.narrow(chunk)
        if rows is None or rows[0] == rows[1]:
            continue
        start, end, ks, ke = rows
        selected = misa.select(
            call.q_quant[start:end],
            call.weights[start:end],
            k,
            ks,
            ke,
            k_scale=scale.view(torch.float32).squeeze(-1),
            config=config,
        )
        call.topk_indices_buffer[start:end, : call.topk_tokens] = selected.indices
    if shard is not None:
        shard.exchange_topk(call.topk_indices_buffer, call.topk_tokens)


def _select_decode(call: SimpleNamespace, metadata: Any, config: misa.Config) -> None:
    """Selects for the decode rows: seq_lens [sequences, next_n], or flattened to [rows, 1]."""
    rows = metadata.num_decode_tokens
    lens = metadata.decode.seq_lens
    lens = lens.reshape(lens.shape[0], -1)
    selected = misa.select_paged(
        call.q_quant[:rows],
        call.weights[:rows],
        call.kv_cache,
        metadata.decode.block_table[: lens.shape[0]],
        lens[:, -1].contiguous(),
        next_n=lens.shape[1],
        config=config,
    )
    call.topk_indices_buffer[:rows, : call.topk_tokens] = selected.indices
