#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures one indexer in vLLM: time to the first token, time for each further token, and the
indexer's share of it, on a few layers of random weights shaped as one rank of eight.

    measure.py VARIANT FOLDER [--layers N] [--batches 1 16 64] [--lengths 16384 65536 131072]

VARIANT: one of VARIANTS. Writes FOLDER/bench-VARIANT.json. First tokens are those of distinct
random prompts, computed whole. Decode has a context of 131,072 tokens for each sequence, of random
bytes in pages of its own. Processes that measure in the same folder start together and then take
turns. Of the turns' medians the least counts: with few layers the host takes longest, and other
processes slow it at times.
"""

from __future__ import annotations

import argparse
import collections
import fcntl
import functools
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "tests" / "engine")]

import checkpoint  # noqa: E402
import serve  # noqa: E402  (sets the environment of an engine in this process)
import torch  # noqa: E402

CONTEXT = 131072
REPEATS = 2
ROUNDS = 5
BATCHED = 8192

VARIANTS: dict[str, dict[str, str]] = {
    "engine": {},
    "dsa": {"MISA_INDEXER": "dsa"},
    "misa-r": {"MISA_INDEXER": "misa-r", "MISA_DECODE": "1"},
    "misa-r-m": {
        "MISA_INDEXER": "misa-r",
        "MISA_HEADS": "3",
        "MISA_CANDIDATES": "4096",
        "MISA_DECODE": "1",
    },
    "hisa": {"MISA_INDEXER": "hisa"},
    "sketch": {
        "MISA_INDEXER": "misa-r",
        "MISA_HEADS": "3",
        "MISA_CANDIDATES": "4096",
        "MISA_SKETCH": "2",
    },
}

# Kernels of the indexer by their names: this library's, DeepGEMM's scores, vLLM's selections and
# gathers.
INDEXER = re.compile(r"misa::|mqa_logits|top_?k|cooperative|radix|gather_indexer", re.IGNORECASE)


def engine(folder: Path, layers: int, batch: int) -> Any:
    from vllm import LLM

    model = folder / "models" / f"rank-{layers}"
    checkpoint.write(model, "v32", layers=layers, context=2 * CONTEXT, rank=True)
    tokens = (batch + 1) * (CONTEXT + 256)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= batch]
    graphs = {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": sizes}
    return LLM(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=CONTEXT + 512,
        max_num_batched_tokens=BATCHED,
        max_num_seqs=batch,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=tokens * layers * (576 * 2 + 132 + 16),
        seed=0,
        kv_transfer_config={
            "kv_connector": "LoadedConnector",
            "kv_connector_module_path": "loaded",
            "kv_role": "kv_both",
        },
        compilation_config=graphs,
    )


def first_tokens(llm: Any, lengths: list[int]) -> dict[int, float]:
    """Milliseconds to the first token by the prompt's length, the least of some."""
    times: dict[int, float] = {}
    serve.generate(llm, serve.prompts((BATCHED,), 99), 1)
    for length in lengths:
        runs = []
        for i in range(REPEATS):
            ids = serve.prompts((length,), 100 + i)
            start = time.perf_counter()
            serve.generate(llm, ids, 1)
            runs.append(time.perf_counter() - start)
        times[length] = min(runs) * 1e3
        print(f"-- first token of {length}: {[round(t * 1e3, 1) for t in runs]} ms", flush=True)
    return times


class Steps:
    """Watches the steps of the engine: when each began, and what some of them ran."""

    MEASURED, PROFILED = range(24, 72), range(76, 88)

    def __init__(self) -> None:
        from vllm.v1.worker.gpu_worker import Worker

        self.begun: list[float] | None = None
        self.profiled = False
        self.replays: list[float] = []
        self.profile: Any = None
        replay = torch.cuda.CUDAGraph.replay

        @functools.wraps(replay)
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            replay(*args)
            self.replays.append(time.perf_counter() - start)

        torch.cuda.CUDAGraph.replay = timed
        run = Worker.execute_model

        @functools.wraps(run)
        def execute_model(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            return run(*args, **kwargs)

        Worker.execute_model = execute_model

    def _begin(self) -> None:
        if self.begun is None:
            return
        step = len(self.begun)
        try:
            if step == self.PROFILED.start and self.profiled:
                activities = [torch.profiler.ProfilerActivity.CUDA]
                self.profile = torch.profiler.profile(activities=activities)
                torch.cuda.synchronize()
                self.profile.start()
            elif step == self.PROFILED.stop and self.profile is not None:
                torch.cuda.synchronize()
                self.profile.stop()
        except Exception as error:  # times are measured without a profiler too
            print(f"-- no profile: {type(error).__name__}: {error}")
            self.profile = None
        self.begun.append(time.perf_counter())

    def token_ms(self) -> float:
        assert self.begun is not None
        times = [b - a for a, b in itertools.pairwise(self.begun[self.MEASURED.start :])]
        return statistics.median(times[: len(self.MEASURED)]) * 1e3


Event = tuple[str, float, float]


def device_events(profile: Any) -> list[Event]:
    """The name, start and end in microseconds of what ran on the device."""
    cuda = torch.autograd.DeviceType.CUDA
    events = (e for e in profile.events() if e.device_type == cuda)
    return [(e.name, e.time_range.start, e.time_range.end) for e in events]


def busy(events: Iterable[Event]) -> float:
    """Microseconds in which at least one of the events ran. Kernels may start early and wait for
    those before them (programmatic dependent launch), so that the sum of their times counts some of
    it twice."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(events, key=lambda e: e[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def next_tokens(llm: Any, batch: int, steps: Steps, profiled: bool) -> dict[str, Any]:
    """One turn: milliseconds for a token of every sequence, and on the host for each replay of a
    graph."""
    import loaded

    loaded.ON = True
    prompt = serve.prompts((CONTEXT,), 1)[0]
    steps.begun, steps.replays, steps.profile = [], [], None
    steps.profiled = profiled
    # Steps before those that are measured admit the sequences.
    last = steps.PROFILED if profiled else steps.MEASURED
    serve.generate(llm, [prompt] * batch, last.stop + 4)
    turn = {"token_ms": steps.token_ms(), "replay_ms": statistics.median(steps.replays or [0])}
    steps.begun, loaded.ON = None, False
    return turn


def on_the_device(steps: Steps, layers: int) -> dict[str, float]:
    """What the profiled steps took on the device: all, and the indexer in a layer."""
    if steps.profile is None:
        return {}
    events = device_events(steps.profile)
    kernels: dict[str, float] = collections.defaultdict(float)
    for name, start, end in events:
        kernels[name] += end - start
    each = len(steps.PROFILED) * layers
    for name, total in sorted(kernels.items(), key=lambda k: -k[1])[:10]:
        marked = "*" if INDEXER.search(name) else " "
        print(f"     {marked} {total / each:9.1f} us a layer  {name[:100]}")
    return {
        "device_ms": busy(events) / len(steps.PROFILED) / 1e3,
        "indexer_us": busy(e for e in events if INDEXER.search(e[0])) / each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--lengths", type=int, nargs="*", default=[16384, 65536, CONTEXT])
    args = parser.parse_args()
    os.environ.update(VARIANTS[args.variant])
    path = args.folder / f"bench-{args.variant}.json"
    result: dict[str, Any] = {"first": {}, "next": {}}
    steps = Steps()
    with (args.folder / "bench.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_SH)  # until all are up
        llm = engine(args.folder, args.layers, max(args.batches))
        try:
            turns: dict[int, list[dict[str, float]]] = {batch: [] for batch in args.batches}
            for i in range(ROUNDS):
                fcntl.flock(turn, fcntl.LOCK_EX)
                for batch in args.batches:
                    turns[batch].append(next_tokens(llm, batch, steps, profiled=i == 0))
                    if i == 0:
                        result["next"][batch] = on_the_device(steps, args.layers)
                    for name in turns[batch][0]:
                        values = [one[name] for one in turns[batch]]
                        result["next"][batch][name] = min(values)
                        result["next"][batch][f"{name}_of_turns"] = values
                    print(f"-- {batch} sequences: {result['next'][batch]}", flush=True)
                path.write_text(json.dumps(result, indent=1))
                fcntl.flock(turn, fcntl.LOCK_UN)
                time.sleep(0.1)  # for the others to take their turns
            fcntl.flock(turn, fcntl.LOCK_EX)
            result["first"] = first_tokens(llm, args.lengths)
        finally:
            if args.variant != "engine":
                from misa.integrations import vllm as plugin

                result["counters"] = plugin.counters()
                print(f"-- {result['counters']}")
            path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
