# SPDX-License-Identifier: Apache-2.0
"""MISA in vLLM: the plugin of the entry point group `vllm.general_plugins`.

vLLM selects the tokens of DSA models with one operator, `sparse_attn_indexer`, which it calls in
two ways: the layer `SparseAttnIndexer` goes through `torch.ops.vllm`, some model files call the
function. Both are replaced under the same name, at which vLLM's compiler splits its graphs. The
replacement selects from the bytes of the key cache, into vLLM's buffer, and calls vLLM's operator
for the rows that MISA does not select for. It has no state between steps, so prefix-cache hits,
preemption and page reuse need no handling.

docs/integrations/vllm.md says how to use it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch

import misa

from ._counters import Counters
from ._environment import Settings, has, read_settings
from ._selector import NOTHING, Bounds, Derived, Selector
from ._vllm_loads import Loads
from ._vllm_memory import reserve
from ._vllm_step import METADATA, PLAIN, UNREAD, Call, Decode, Step

_MODULE = "vllm.model_executor.layers.sparse_attn_indexer"
_METADATA_MODULE = "vllm.v1.attention.backends.mla.indexer"
_OPERATOR = "sparse_attn_indexer"
_PAGE = 64

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
        problem = _text(error)
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
        loads = Loads(max(config.cache_config.block_size // _PAGE, 1))
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
        strict: whether a layer that MISA cannot serve is an error.
        fixed: whether all sequences of a captured decode have as many queries in every replay.
        loads: what sees the pages that a KV connector brings.
    """
    operator = _Operator(original, engine, selector, strict, fixed)
    if loads is not None:
        loads.rebuild = operator.rebuild

    @functools.wraps(original)
    def sparse_attn_indexer(*args: Any, **kwargs: Any) -> torch.Tensor:
        return operator(args, kwargs)

    return sparse_attn_indexer


class _Strict(RuntimeError):
    """An error that MISA_STRICT asks for."""


class _Layer(NamedTuple):
    """cache: its key cache.
    reason: why it is left to vLLM's operator, or None.
    derived: from its keys, for decode.
    """

    cache: torch.Tensor
    reason: str | None
    derived: Derived

    def has(self, cache: torch.Tensor) -> bool:
        same_memory = cache.data_ptr() == self.cache.data_ptr()
        return same_memory and cache.shape[0] == self.cache.shape[0]


class _Operator:
    """See replace()."""

    def __init__(
        self,
        original: Callable[..., Any],
        engine: Any,
        selector: Selector,
        strict: bool,
        fixed: bool,
    ) -> None:
        self._original = original
        self._engine = engine
        self._selector = selector
        self._strict = strict
        self._fixed = fixed
        self._shards = getattr(engine, "PrefillRowShard", None)
        self._layers: dict[str, _Layer] = {}
        self._counted = ""  # the layer in which rows are counted
        self._failed: dict[str, str] = {}
        self._broken = False
        # Where each argument of a Call is among those of the operator, and then the defaults of
        # those that it does not have.
        parameters = inspect.signature(original).parameters
        self._names = list(parameters)
        self._defaults = [p.default for p in parameters.values()]
        absent = [name for name in Call._fields if name not in parameters]
        self._absent = tuple(Call._field_defaults[name] for name in absent)
        places = {name: place for place, name in enumerate([*self._names, *absent])}
        self._read = itemgetter(*(places[name] for name in Call._fields))

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        context = self._engine.get_forward_context()
        # There is no metadata in a profiling run.
        if self._broken or not isinstance(context.attn_metadata, dict):
            return self._original(*args, **kwargs)
        try:
            call = self._call(args, kwargs)
            name = _layer_name(call.k_cache_prefix)
            metadata = context.attn_metadata[name]
            step = self._step(metadata)
            capturing = _capturing(call.q_quant)
            layer = self._layer(name, call, capturing)
            taken = self._taken(call, context, layer, step, capturing)
        except _Strict:
            raise
        except Exception as error:
            self._broken = True
            _counters.leave("everything", _text(error))
            return self._original(*args, **kwargs)
        if taken and len(taken) == len(step.rows):
            self._insert_and_clear(call, metadata, step)
        else:
            with _metadata(context, name, step.without(taken)):
                self._original(*args, **kwargs)
        work = "decode"
        try:
            if layer.derived is not NOTHING:
                self._selector.derive(layer.derived, call.kv_cache, metadata.slot_mapping)
            if "decode" in taken:
                decode = step.grouped if capturing and self._fixed else step.decode
                self._decode(call, step.decode_rows, decode, layer)
            work = "prefill"
            if "prefill" in taken:
                self._prefill(call, step)
        except Exception as error:
            # Whatever was done so far can be done again.
            self._failed[work] = _text(error)
            if work == "decode":
                self._layers[name] = layer._replace(derived=NOTHING)
            return self(args, kwargs)
        if name == self._counted:
            for work, rows in step.rows.items():
                who = "misa" if work in taken else "engine"
                _counters.add(f"{who}_{work}", rows, capturing)
        return call.topk_indices_buffer

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        values = args
        if kwargs or len(args) < len(self._names):
            rest = zip(self._names[len(args) :], self._defaults[len(args) :], strict=True)
            values = (*args, *(kwargs.get(name, default) for name, default in rest))
        return Call(*self._read((*values, *self._absent)))

    def _step(self, metadata: Any) -> Step:
        step = getattr(metadata, "misa_step", None)
        if step is None:
            step = Step(metadata, self._selector.prefill.total, self._shards)
            metadata.misa_step = step
        return step

    def _layer(self, name: str, call: Call, capturing: bool) -> _Layer:
        """What is kept of a layer as long as it has the same cache."""
        cache = call.kv_cache
        layer = self._layers.get(name)
        if layer is not None and layer.has(cache):
            return layer
        reason, derived = self._uncovered(call), NOTHING
        if reason is None and self._selector.derives and "decode" not in self._failed:
            if capturing:  # what is allocated now would be the graph's
                reason = "a layer whose first step is captured into a CUDA graph"
            else:
                derived = self._selector.derived(cache)
        layer = _Layer(cache, reason, derived)
        self._layers[name] = layer
        self._counted = self._counted or name
        return layer

    def rebuild(self, pages: list[int]) -> None:
        """Makes again, in every layer, what is derived from the keys of some pages."""
        try:
            for cache, _, derived in self._layers.values():
                if derived is not NOTHING:
                    there = [page for page in pages if page < cache.shape[0]]
                    self._selector.rebuild(derived, cache, torch.tensor(there, dtype=torch.int32))
        except Exception as error:
            self._failed["decode"] = _text(error)

    def _taken(
        self, call: Call, context: Any, layer: _Layer, step: Step, capturing: bool
    ) -> list[str]:
        """What MISA selects for in this step, "decode" and "prefill"."""
        reason = layer.reason
        if reason is None and _is_dense(call, context):
            reason = "attention is dense, and asks for no positions"
        taken = []
        if step.decode_rows and self._takes_decode(step, reason, capturing):
            taken.append("decode")
        if step.prefill_rows and self._takes_prefill(step, reason, capturing):
            taken.append("prefill")
        return taken

    def _uncovered(self, call: Call) -> str | None:
        """Why a layer must be left to vLLM's operator, or None.

        Raises RuntimeError if that is so and MISA_STRICT is set.
        """
        reason = self._unlike_the_plans(call)
        if reason is not None and self._strict:
            raise _Strict(f"MISA_STRICT: expected a layer that MISA can serve, got {reason}")
        return reason

    def _unlike_the_plans(self, call: Call) -> str | None:
        for name, plain in PLAIN.items():
            value = getattr(call, name)
            if isinstance(value, torch.Tensor) or value != plain:
                return f"{name} is set"
        if call.q_quant.dtype != torch.float8_e4m3fn:
            return f"queries in {call.q_quant.dtype}"
        if tuple(call.kv_cache.shape[1:]) != (_PAGE, call.head_dim + 4):
            return f"a key cache of shape {tuple(call.kv_cache.shape)}"
        if call.topk_tokens != self._selector.config.top_k:
            return f"a layer that selects {call.topk_tokens} positions"
        if getattr(self._engine, "mqa_logits_use_mx_scales", bool)():
            return "key scales in MX format"
        return None

    def _takes_decode(self, step: Step, reason: str | None, capturing: bool) -> bool:
        """Whether MISA selects for a step's decode rows; says once why not."""
        bounds, decode = self._selector.decode, step.decode
        if bounds is None:
            return False
        assert decode is not None
        reason = reason or self._failed.get("decode")
        if step.decode_rows > bounds.rows or decode.lengths.shape[0] > bounds.sequences:
            reason = f"{step.decode_rows} rows, more than planned for"
        elif capturing and decode.starts is not None:
            reason = "a CUDA graph for sequences that decode unequal numbers of tokens"
        if reason is not None:
            _counters.leave("decode", reason)
        return reason is None

    def _takes_prefill(self, step: Step, reason: str | None, capturing: bool) -> bool:
        """Whether MISA selects for a step's prefill rows; says once why not."""
        bounds = self._selector.prefill
        reason = reason or self._failed.get("prefill")
        if capturing:
            reason = "a CUDA graph of a prefill"
        for group in step.groups:
            if group.end - group.start > bounds.rows or group.keys > bounds.total:
                rows = group.end - group.start
                reason = f"{rows} rows on {group.keys} keys, more than planned for"
        if reason is not None:
            _counters.leave("prefill", reason)
        return reason is None

    def _insert_and_clear(self, call: Call, metadata: Any, step: Step) -> None:
        """What vLLM's operator does before it selects: inserts the step's keys, and marks all
        entries of its rows as empty, of which only those are left that no selection writes."""
        if not call.skip_k_cache_insert:
            slots = metadata.slot_mapping
            assert call.k is not None
            self._engine.ops.indexer_k_quant_and_cache(
                call.k[: slots.shape[0]],
                call.kv_cache,
                slots,
                call.quant_block_size,
                call.scale_fmt,
            )
        if not call.skip_topk_buffer_clear:
            rows, buffer = call.hidden_states.shape[0], call.topk_indices_buffer
            written = step.covered if buffer.shape[1] == call.topk_tokens else 0
            if written < rows:
                buffer[written:rows] = -1

    def _decode(self, call: Call, rows: int, decode: Decode | None, layer: _Layer) -> None:
        assert decode is not None
        self._selector.paged(
            call.q_quant[:rows],
            call.weights[:rows],
            call.kv_cache,
            decode.table,
            decode.lengths,
            call.topk_indices_buffer[:rows, : call.topk_tokens],
            starts=decode.starts,
            derived=layer.derived,
        )

    def _prefill(self, call: Call, step: Step) -> None:
        """vLLM's kernel gathers the keys of each group into the workspace that vLLM reserved."""
        engine = self._engine
        keys, scales = engine.current_workspace_manager().get_simultaneous(
            ((call.total_seq_lens, call.head_dim), torch.float8_e4m3fn),
            ((call.total_seq_lens, 4), torch.uint8),
        )
        for group in step.groups:
            for table, cu_lengths, first, end in group.gathers:
                engine.ops.cp_gather_indexer_k_quant_cache(
                    call.kv_cache, keys[first:end], scales[first:end], table, cu_lengths
                )
            ks, ke = group.bounds
            self._selector.ragged(
                call.q_quant[group.start : group.end],
                call.weights[group.start : group.end],
                keys[: group.keys],
                ks,
                ke,
                scales[: group.keys].view(torch.float32).squeeze(-1),
                call.topk_indices_buffer[group.start : group.end, : call.topk_tokens],
            )
        if step.shard is not None:
            step.shard.exchange_topk(call.topk_indices_buffer, call.topk_tokens)


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _layer_name(name: Any) -> str:
    """vLLM passes a layer's name as a string or in an object that its compiler can trace."""
    return getattr(name, "value", name)


def _is_dense(call: Call, context: Any) -> bool:
    """Whether the attention of this step reads all positions."""
    attention = context.attn_metadata.get(_layer_name(call.dense_mha_metadata_layer_name))
    return bool(getattr(getattr(attention, "prefill", None), "use_dense_mha", False))


@contextlib.contextmanager
def _metadata(context: Any, layer: str, metadata: Any) -> Iterator[None]:
    """Gives vLLM's operator another metadata object for one layer."""
    whole = context.attn_metadata
    context.attn_metadata = {**whole, layer: metadata}
    try:
        yield
    finally:
        context.attn_metadata = whole
