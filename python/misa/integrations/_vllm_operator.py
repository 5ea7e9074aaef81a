# SPDX-License-Identifier: Apache-2.0
"""The operator that stands in the place of vLLM's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from ._counters import Counters
from ._selector import NOTHING, PAGE, Derived, Selector
from ._vllm_step import PLAIN, Call, Decode, Step, rows_of

_DENSE = "attention is dense, and asks for no positions"


class StrictError(RuntimeError):
    """An error that MISA_STRICT asks for."""


class StaleError(RuntimeError):
    """CUDA graphs would select wrong positions."""


@dataclass
class Layer:
    """cache: its key cache.
    reason: why it is left to vLLM's operator, or None.
    derived: from its keys, for decode.
    captured: whether CUDA graphs use `derived`.
    """

    cache: torch.Tensor
    reason: str | None
    derived: Derived
    captured: bool = False

    def has(self, cache: torch.Tensor) -> bool:
        same_memory = cache.data_ptr() == self.cache.data_ptr()
        return same_memory and cache.shape[0] == self.cache.shape[0]


class Operator:
    """See replace() of vllm.py.

    An error of MISA's leaves work to vLLM's operator from then on, but for graphs that are captured
    already: no Python code runs in a replay. What they select by is therefore derived from the keys
    of every step, whatever else has failed, and if that fails vLLM has to stop.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        engine: Any,
        selector: Selector,
        counters: Counters,
        strict: bool,
        fixed: bool,
    ) -> None:
        self._original = original
        self._engine = engine
        self._selector = selector
        self._counters = counters
        self._strict = strict
        self._fixed = fixed
        self._shards = getattr(engine, "PrefillRowShard", None)
        self._layers: dict[str, Layer] = {}
        self._counted = ""  # the layer in which rows are counted
        self._failed: dict[str, str] = {}  # why "decode", "prefill" or "everything" is vLLM's
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
        if not isinstance(context.attn_metadata, dict):
            return self._original(*args, **kwargs)
        # What is read here vLLM's operator reads too.
        call = self._call(args, kwargs)
        name = layer_name(call.k_cache_prefix)
        metadata = context.attn_metadata[name]
        capturing = is_capturing(call.q_quant)
        self._counted = self._counted or name
        layer = self._layers.get(name)
        if layer is not None and not layer.has(call.kv_cache):
            layer = None
        step, whole, left = None, False, metadata
        taken: list[str] = []
        if "everything" not in self._failed:
            try:
                layer = layer or self._new_layer(name, call, capturing)
                step = self._step(metadata)
                taken = self._taken(call, context, layer, step, capturing)
                whole = bool(taken) and len(taken) == len(step.rows)
                if whole:
                    self._insert_and_clear(call, metadata, step)
                else:
                    left = step.without(taken)
            except Exception as error:
                self._fail("everything", error)
                taken, whole, left = [], False, metadata
        if not whole:
            with _metadata(context, name, left):
                self._original(*args, **kwargs)
        work = "decode"
        try:
            if layer is not None and layer.derived is not NOTHING:
                self._derive(layer, call, metadata, capturing)
            if layer is not None and step is not None and "decode" in taken:
                decode = step.grouped if capturing and self._fixed else step.decode
                self._decode(call, step.decode_rows, decode, layer)
            work = "prefill"
            if step is not None and "prefill" in taken:
                self._prefill(call, step)
        except StaleError:
            raise
        except Exception as error:
            # Whatever was done so far can be done again.
            self._fail(work, error)
            return self(args, kwargs)
        if name == self._counted:
            rows = rows_of(metadata) if step is None else step.rows
            for work, count in rows.items():
                who = "misa" if work in taken else "engine"
                self._counters.add(f"{who}_{work}", count, capturing)
        return call.topk_indices_buffer

    def _derive(self, layer: Layer, call: Call, metadata: Any, capturing: bool) -> None:
        """What decode reads, of the keys of a step."""
        try:
            self._selector.derive(layer.derived, call.kv_cache, metadata.slot_mapping)
        except Exception as error:
            self._lose(layer, error)
            raise
        layer.captured |= capturing

    def _fail(self, work: str, error: Exception) -> None:
        """Leaves work to vLLM's operator from now on; StrictError if MISA_STRICT is set."""
        if isinstance(error, StrictError):
            raise error
        self._failed[work] = text(error)
        self._leave(work, self._failed[work])

    def _leave(self, work: str, reason: str) -> None:
        """Says, once, why work is left to vLLM's operator; StrictError if MISA_STRICT is set."""
        if self._strict and reason != _DENSE:
            raise StrictError(f"MISA_STRICT: expected MISA to select for {work}, but {reason}")
        self._counters.leave(work, reason)

    def _lose(self, layer: Layer, error: Exception) -> None:
        """What is derived from a layer's keys is no longer that of all keys: nothing reads it from
        now on. StaleError if CUDA graphs do, which would select wrong positions.
        """
        if layer.captured:
            raise StaleError(
                "MISA: expected to derive what captured CUDA graphs decode by from all keys, got "
                f"{text(error)}; vLLM has to be started again"
            ) from error
        layer.derived = NOTHING

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

    def _new_layer(self, name: str, call: Call, capturing: bool) -> Layer:
        """What is kept of a layer as long as it has the same cache."""
        layer = Layer(call.kv_cache, self._uncovered(call), NOTHING)
        self._layers[name] = layer
        if layer.reason is None and self._selector.derives and "decode" not in self._failed:
            if capturing:  # what is allocated now would be the graph's
                layer.reason = "a layer whose first step is captured into a CUDA graph"
            else:
                try:
                    layer.derived = self._selector.derived(call.kv_cache)
                except Exception as error:
                    self._fail("decode", error)
        return layer

    def rebuild(self, pages: list[int]) -> None:
        """Makes again, in every layer, what is derived from the keys of some pages.

        Raises StaleError if that fails and CUDA graphs select by it.
        """
        for layer in self._layers.values():
            if layer.derived is not NOTHING:
                there = [page for page in pages if page < layer.cache.shape[0]]
                numbers = torch.tensor(there, dtype=torch.int32)
                try:
                    self._selector.rebuild(layer.derived, layer.cache, numbers)
                except Exception as error:
                    self._lose(layer, error)
                    self._fail("decode", error)

    def lose(self, error: Exception) -> None:
        """It is not known which pages a KV connector brought. Raises as rebuild() does."""
        for layer in self._layers.values():
            if layer.derived is not NOTHING:
                self._lose(layer, error)
                self._fail("decode", error)

    def _taken(
        self, call: Call, context: Any, layer: Layer, step: Step, capturing: bool
    ) -> list[str]:
        """What MISA selects for in this step, "decode" and "prefill"."""
        reason = layer.reason
        if reason is None and _is_dense(call, context):
            reason = _DENSE
        taken = []
        if step.decode_rows and self._takes_decode(step, reason, capturing):
            taken.append("decode")
        if step.prefill_rows and self._takes_prefill(step, reason, capturing):
            taken.append("prefill")
        return taken

    def _uncovered(self, call: Call) -> str | None:
        """Why a layer must be left to vLLM's operator, or None."""
        for name, plain in PLAIN.items():
            value = getattr(call, name)
            if isinstance(value, torch.Tensor) or value != plain:
                return f"{name} is set"
        if call.q_quant.dtype != torch.float8_e4m3fn:
            return f"queries in {call.q_quant.dtype}"
        if tuple(call.kv_cache.shape[1:]) != (PAGE, call.head_dim + 4):
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
            self._leave("decode", reason)
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
            self._leave("prefill", reason)
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

    def _decode(self, call: Call, rows: int, decode: Decode | None, layer: Layer) -> None:
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


def is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def layer_name(name: Any) -> str:
    """vLLM passes a layer's name as a string or in an object that its compiler can trace."""
    return getattr(name, "value", name)


def _is_dense(call: Call, context: Any) -> bool:
    """Whether the attention of this step reads all positions."""
    attention = context.attn_metadata.get(layer_name(call.dense_mha_metadata_layer_name))
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
