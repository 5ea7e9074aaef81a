# SPDX-License-Identifier: Apache-2.0
"""Records what SGLang's indexer is given and what comes, in the process of its scheduler.

The plugin's hooks are wrapped: after them, SGLang's own method selects from the same inputs, and
both results are kept beside the inputs. In a captured graph all of that is captured. Prefill is
judged when it runs, decode after the step, when its keys still lie in their pages. Whatever form
SGLang wants indices in, positions are what is judged. Calls of a draft model are not: its graphs
are replayed where no step of the model begins or ends.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from judge import PAGE, Row, judge, replay

from misa.integrations import sglang as plugin

FAR = 1 << 20  # of a page that the sequence does not have: its positions are behind every key
ROWS = 32  # the most of a step of decode: 8 sequences of 4 tokens


def positions(
    indices: torch.Tensor,
    metadata: Any,
    table: torch.Tensor,
    seen: torch.Tensor,
    pages: int,
    fused: bool,
    rows: torch.Tensor | slice,
) -> torch.Tensor:
    """Positions int32 [n, top_k] from what SGLang wants in their place; no wait for the device.

    indices: int32 [n, top_k], of the metadata's `rows`; table: int32 [n, …], their pages; seen:
    int32 [n]; pages: those of the cache; fused: whether indices are not positions already.
    """
    if not fused:
        return indices
    if metadata.topk_transform_method.name == "RAGGED":
        places = indices - metadata.attn_metadata.topk_indices_offset[rows, None]
    else:
        numbers = torch.arange(table.shape[1], device=table.device).expand(table.shape)
        used = numbers < ((seen + PAGE - 1) // PAGE)[:, None]
        inverse = numbers.new_full((table.shape[0], pages + 1), FAR)
        inverse.scatter_(1, torch.where(used, table, pages).long(), numbers)
        inverse[:, pages] = FAR
        page = indices.clamp(min=0).long() // PAGE
        places = inverse.gather(1, page) * PAGE + indices % PAGE
    return torch.where(indices < 0, indices, places).int()


class Recorder(record.Recorder):
    """The tally of the scheduler's process."""

    retracted = 0  # sequences

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.drafts: set[torch.nn.Module] = set()  # modules of a draft model

    def install(self) -> None:
        """Before the plugin hooks SGLang."""
        plugin.ragged = self._around(plugin.ragged, "_get_topk_ragged", self._prefill)  # type: ignore[assignment]
        plugin.paged = self._around(plugin.paged, "_get_topk_paged", self._decode)  # type: ignore[assignment]
        from sglang.srt.model_executor.model_runner import ModelRunner

        run = ModelRunner.forward

        @functools.wraps(run)
        def forward(runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            rows = batch.input_ids.shape[0]
            result = run(runner, batch, *args, **kwargs)
            for kept in self._kept.values():  # rows that pad a graph's batch
                kept.seen[rows:].zero_()
                kept.got[rows:].fill_(-1)
            self.after_step()
            return result

        ModelRunner.forward = forward
        load = ModelRunner.load_model

        @functools.wraps(load)
        def load_model(runner: Any, *args: Any, **kwargs: Any) -> Any:
            result = load(runner, *args, **kwargs)
            if runner.is_draft_worker:
                self.drafts |= set(runner.model.modules())
            return result

        ModelRunner.load_model = load_model
        from sglang.srt.managers.schedule_batch import ScheduleBatch

        retract = ScheduleBatch.retract_decode

        @functools.wraps(retract)
        def retract_decode(*args: Any, **kwargs: Any) -> Any:
            result = retract(*args, **kwargs)
            self.retracted += len(result[0])
            return result

        ScheduleBatch.retract_decode = retract_decode

    def report(self) -> dict[str, Any]:
        tallies = {work: tally.summary() for work, tally in self.tally.items()}
        return {"preempted": self.retracted, **tallies}

    def _around(self, make: Callable, method: str, keep: Callable) -> Callable:
        """plugin.ragged or plugin.paged, whose hook's calls are kept."""

        @functools.wraps(make)
        def made(engine: Any, settings: Any, *more: Any) -> Callable:
            hook = make(engine, settings, *more)
            signature = inspect.signature(getattr(engine.Indexer, method))

            def recorded(original: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
                result = hook(original, *args, **kwargs)
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                call = bound.arguments
                if call["self"] in self.drafts:
                    return result
                self.config = settings.config(call["self"].index_topk)
                metadata = call["metadata"]
                fused = engine.envs.SGLANG_DSA_FUSE_TOPK.get() and not metadata.force_unfused_topk
                cache = call["self"]._get_index_k_read_buffer(
                    engine.get_token_to_kv_pool(), call["layer_id"]
                )
                keep(call, result, original, cache.view(cache.shape[0], PAGE, -1), fused)
                return result

            return recorded

        return made

    def _prefill(
        self,
        call: dict[str, Any],
        result: torch.Tensor,
        original: Callable,
        cache: torch.Tensor,
        fused: bool,
    ) -> None:
        if not self.on or torch.cuda.is_current_stream_capturing():
            return
        layer = f"layer {call['layer_id']}"
        name, tally = f"prefill, {layer}", self.tally["prefill"]
        with self._careful("prefill", layer):
            metadata = call["metadata"]
            starts, ends = metadata.get_indexer_kvcache_range()
            count = starts.shape[0]
            if bool((result[count:] != -1).any()):
                tally.fault(f"{name}: positions in rows that pad the batch")
            theirs = original(**(call | {"topk_result": None}))
            # Some rows of each request.
            requests = metadata.get_token_to_batch_idx()[:count].long()
            places = set()
            for request in requests.unique():
                mine = (requests == request).nonzero()[:, 0].tolist()
                places |= {*mine[:: max(len(mine) // record.PREFILL_ROWS, 1)], mine[-1]}
            rows = torch.tensor(sorted(places), device=starts.device)
            table = metadata.get_page_table_64()[requests[rows]]
            seen = ends[rows] - starts[rows]
            judged = []
            got, own = (
                positions(indices[rows], metadata, table, seen, cache.shape[0], fused, rows)
                for indices in (result, theirs)
            )
            for i, place in enumerate(rows.tolist()):
                row = Row(
                    call["q_fp8"][place].view(torch.uint8),
                    call["weights"][place].reshape(-1).float(),
                    table[i],
                    int(seen[i]),
                    got[i],
                    own[i],
                )
                judge(row, cache, tally, name, self.compared)
                judged.append(row)
            some = judged[:: max(len(judged) // 6, 1)]
            replay(some, cache, self.config, tally, name)

    def _decode(
        self,
        call: dict[str, Any],
        result: torch.Tensor,
        original: Callable,
        cache: torch.Tensor,
        fused: bool,
    ) -> None:
        layer = f"layer {call['layer_id']}"
        capturing = torch.cuda.is_current_stream_capturing()
        if not (self.on or capturing or layer not in self._kept):
            return
        theirs = original(**call)
        with self._careful("decode", layer):
            metadata, q = call["metadata"], call["q_fp8"]
            seen, table = metadata.get_seqlens_expanded(), metadata.get_page_table_64()
            rows = seen.shape[0]
            if layer not in self._kept:
                pages = -(-self.context // PAGE) + 2
                self._kept[layer] = record.Kept(ROWS, q, cache, result.shape[1], pages)
            kept = self._kept[layer]
            kept.cache = cache
            kept.q[:rows].copy_(q[:rows].view(torch.uint8))
            kept.w[:rows].copy_(call["weights"][:rows].squeeze(-1))
            kept.seen[:rows].copy_(seen)
            kept.table[:rows, : table.shape[1]].copy_(table)
            for ours, indices in ((kept.got, result), (kept.engine, theirs)):
                some = indices[:rows]
                whole = slice(0, rows)
                ours[:rows].copy_(
                    positions(some, metadata, table, seen, cache.shape[0], fused, whole)
                )
            kept.count.fill_(rows)

    context = 16384  # tokens of the longest sequence


def run_scheduler_process(*args: Any, **kwargs: Any) -> Any:
    """SGLang's, whose scheduler also has the calls `misa_start` and `misa_report`."""
    from sglang.srt.managers import scheduler

    recorder = Recorder(ROWS)
    recorder.install()
    before: dict[str, int] = {}

    def start(_scheduler: Any, compared: bool) -> None:
        recorder.compared = compared
        before.update(plugin.counters())
        recorder.start()

    def report(_scheduler: Any, path: str) -> None:
        counters = {name: n - before.get(name, 0) for name, n in plugin.counters().items()}
        Path(path).write_text(json.dumps({"counters": counters, **recorder.report()}))

    scheduler.Scheduler.misa_start = start
    scheduler.Scheduler.misa_report = report
    return scheduler.run_scheduler_process(*args, **kwargs)
