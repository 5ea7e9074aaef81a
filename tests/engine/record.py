# SPDX-License-Identifier: Apache-2.0
"""Records what vLLM's indexer is given and what comes, in every layer and also in replayed graphs.

The plugin's operator is wrapped: after it, vLLM's own selects from the same inputs into a buffer of
its own, and both results are kept beside the inputs. In a captured graph all of that is captured.
Prefill is judged when it runs, decode after the step, when its keys still lie in their pages.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from judge import Row, Tally, judge, replay

from misa.integrations import vllm as plugin

PREFILL_ROWS = 12  # that are judged of a chunk
DECODE_ROWS = 4  # that are judged of a step


class Kept:
    """A layer's last decode rows, in memory that captured kernels write."""

    @torch.inference_mode(False)  # so that it can be written between steps
    def __init__(
        self, rows: int, q: torch.Tensor, cache: torch.Tensor, top_k: int, pages: int
    ) -> None:
        """rows: the most of a step; q [T, H, D]; pages: those of the longest sequence."""
        device = q.device
        self.cache = cache
        self.q = torch.zeros((rows, *q.shape[1:]), dtype=torch.uint8, device=device)
        self.w = torch.zeros((rows, q.shape[1]), device=device)
        self.table = torch.zeros((rows, pages), dtype=torch.int32, device=device)
        self.seen = torch.zeros(rows, dtype=torch.int32, device=device)
        self.got = torch.zeros((rows, top_k), dtype=torch.int32, device=device)
        self.engine = torch.zeros((rows, top_k), dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.comparable = torch.ones(1, dtype=torch.int32, device=device)


class Recorder:
    """The tally of a process. `rows`: the most decode rows of a step."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.tally = {"prefill": Tally(), "decode": Tally()}
        self.on = False
        self.compared = True  # whether the same positions as the engine's are expected
        self.config: Any = None
        self.steps = 0
        # Seconds that calls took on the host while they are measured: MISA's operator, the
        # selection within it, and vLLM's operator.
        self.times: dict[str, list[float]] | None = None
        self._kept: dict[str, Kept] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    def install(self) -> None:
        """Before the engine is made."""
        inner = plugin.replace

        def replace(original: Callable, engine: Any, selector: Any, **options: Any) -> Callable:
            self.config = selector.config
            selector.paged = self._clocked("selection", selector.paged)
            return self._wrapped(inner(original, engine, selector, **options), original, engine)

        plugin.replace = replace  # type: ignore[assignment]
        from vllm.v1.worker.gpu_worker import Worker

        run = Worker.execute_model

        @functools.wraps(run)
        def execute_model(*args: Any, **kwargs: Any) -> Any:
            result = run(*args, **kwargs)
            self.after_step()
            return result

        Worker.execute_model = execute_model

    @torch.inference_mode()
    def start(self) -> None:
        """Judges from now on."""
        for kept in self._kept.values():
            kept.count.zero_()
        self.on = True

    @contextlib.contextmanager
    def _careful(self, work: str, layer: str) -> Iterator[None]:
        """An error of the judge is a fault that is reported, and ends no request."""
        try:
            yield
        except Exception as error:
            self.tally[work].fault(f"{work}, {layer}: the judge: {type(error).__name__}: {error}")

    def _wrapped(self, operator: Callable, original: Callable, engine: Any) -> Callable:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            if self.times is not None:
                return self._timed(operator, original, args, kwargs)
            result = operator(*args, **kwargs)
            metadata = engine.get_forward_context().attn_metadata
            if isinstance(metadata, dict):
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                call = bound.arguments
                layer = getattr(call["k_cache_prefix"], "value", call["k_cache_prefix"])
                self._record(call, layer, metadata[layer], original)
            return result

        return recorded

    def _timed(
        self, operator: Callable, original: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        result = self._clocked("misa", operator)(*args, **kwargs)
        self._clocked("engine", original)(*args, **kwargs)
        return result

    def _clocked(self, name: str, function: Callable) -> Callable:
        """`function`, whose times go under `name` while times are measured."""

        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if self.times is not None:
                self.times.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return clocked

    def _record(self, call: dict[str, Any], layer: str, metadata: Any, original: Callable) -> None:
        capturing = torch.cuda.is_current_stream_capturing()
        if not (self.on or capturing or layer not in self._kept):
            return
        ours = call["topk_indices_buffer"]
        if layer not in self._buffers:
            self._buffers[layer] = torch.empty_like(ours)
        theirs = self._buffers[layer]
        original(**(call | {"topk_indices_buffer": theirs, "skip_k_cache_insert": True,
                            "skip_topk_buffer_clear": False}))  # fmt: skip
        if metadata.num_decodes and metadata.num_decode_tokens:
            with self._careful("decode", layer):
                self._keep_decode(call, layer, metadata, theirs)
        if metadata.num_prefills and self.on and not capturing:
            with self._careful("prefill", layer):
                self._judge_prefill(call, layer, metadata, theirs)

    def _keep_decode(
        self, call: dict[str, Any], layer: str, metadata: Any, theirs: torch.Tensor
    ) -> None:
        decode, rows = metadata.decode, metadata.num_decode_tokens
        lengths = decode.seq_lens
        lengths = lengths.reshape(lengths.shape[0], -1)
        sequences, next_n = lengths.shape
        table = decode.block_table[:sequences]
        if layer not in self._kept:
            q, cache = call["q_quant"], call["kv_cache"]
            self._kept[layer] = Kept(self.rows, q, cache, call["topk_tokens"], table.shape[1])
        kept = self._kept[layer]
        kept.cache = call["kv_cache"]
        if decode.requires_padding or sequences * next_n != rows:
            # vLLM scores such rows for shorter contexts than they have, so there is nothing to
            # compare with; MISA's own are judged by their exact scores.
            counts = decode.decode_lens[:sequences].long()
            which = torch.repeat_interleave(torch.arange(sequences, device=counts.device), counts)
            ends = counts.cumsum(0)
            place = torch.arange(rows, device=counts.device)
            seen = lengths[which, -1] - (ends[which] - 1 - place).int()
            kept.comparable.fill_(0)
        else:
            seen, which = lengths.reshape(-1), None
            kept.comparable.fill_(1)
        top_k = call["topk_tokens"]
        kept.q[:rows].copy_(call["q_quant"][:rows].view(torch.uint8))
        kept.w[:rows].copy_(call["weights"][:rows])
        kept.seen[:rows].copy_(seen)
        if which is None:
            kept.table[:rows].copy_(table.repeat_interleave(next_n, 0) if next_n > 1 else table)
        else:
            kept.table[:rows].copy_(table[which])
        kept.got[:rows].copy_(call["topk_indices_buffer"][:rows, :top_k])
        kept.engine[:rows].copy_(theirs[:rows, :top_k])
        kept.count.fill_(rows)

    @torch.inference_mode()
    def after_step(self) -> None:
        """Judges some of the decode rows of the step."""
        if not self.on:
            return
        self.steps += 1
        for layer, kept in self._kept.items():
            with self._careful("decode", layer):
                rows = int(kept.count)
                kept.count.zero_()
                if rows:
                    self._judge_decode(layer, kept, rows)

    def _judge_decode(self, layer: str, kept: Kept, rows: int) -> None:
        tally, name = self.tally["decode"], f"decode, {layer}"
        comparable = bool(kept.comparable)
        apart = max(rows // DECODE_ROWS, 1)
        judged = []
        for place in sorted({(self.steps + i * apart) % rows for i in range(DECODE_ROWS)}):
            row = Row(
                kept.q[place],
                kept.w[place],
                kept.table[place],
                int(kept.seen[place]),
                kept.got[place],
                kept.engine[place] if comparable else None,
            )
            judge(row, kept.cache, tally, name, self.compared)
            judged.append(row)
        replay(judged, kept.cache, self.config, tally, name)

    def _judge_prefill(
        self, call: dict[str, Any], layer: str, metadata: Any, theirs: torch.Tensor
    ) -> None:
        top_k, judged = call["topk_tokens"], []
        tally, name = self.tally["prefill"], f"prefill, {layer}"
        for chunk in metadata.prefill.chunks:
            count = chunk.token_end - chunk.token_start
            step = max(count // PREFILL_ROWS, 1)
            for i in sorted({*range(0, count, step), count - 1}):
                place, first = chunk.token_start + i, int(chunk.cu_seqlen_ks[i])
                request = int(chunk.token_to_seq[first])
                row = Row(
                    call["q_quant"][place].view(torch.uint8),
                    call["weights"][place].float(),
                    chunk.block_table[request],
                    int(chunk.cu_seqlen_ke[i]) - first,
                    call["topk_indices_buffer"][place, :top_k].clone(),
                    theirs[place, :top_k].clone(),
                )
                judge(row, call["kv_cache"], tally, name, self.compared)
                judged.append(row)
        some = judged[:: max(len(judged) // 6, 1)]
        replay(some, call["kv_cache"], self.config, tally, name)
