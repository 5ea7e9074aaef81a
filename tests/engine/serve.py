#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Serves a small random model with vLLM, its indexer replaced by MISA's, and judges every layer.

    serve.py MODE FOLDER        MODE: one of MODES; FOLDER: for models, results and logs

Writes FOLDER/MODE.json and prints PASSED or FAILED. The engine runs in this process, offline, on
prompts of random tokens.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

import checkpoint  # noqa: E402
import torch  # noqa: E402

# indexer: MISA_* variables. graphs: vLLM's cudagraph_mode. drafts: tokens that a random draft
# layer proposes. small: a cache that cannot hold all sequences, so that some are preempted.
# offload: a cache that holds the first requests only, whose pages go to host memory and come back.
# exact: whether the positions are the engine's, up to rounding. timed: host time is measured too.
DSA = {"MISA_INDEXER": "dsa"}
SKETCH = {
    "MISA_INDEXER": "misa-r",
    "MISA_HEADS": "3",
    "MISA_CANDIDATES": "4096",
    "MISA_SKETCH": "2",
}
MODES: dict[str, dict[str, Any]] = {
    "full": {"graphs": "FULL_AND_PIECEWISE"},
    "eager": {"timed": True},
    "fp8": {"graphs": "FULL_AND_PIECEWISE", "fp8": True},
    "glm": {"graphs": "FULL_AND_PIECEWISE", "kind": "glm"},
    "glm-shared": {"graphs": "FULL_AND_PIECEWISE", "kind": "glm-shared"},
    "mtp2": {"graphs": "FULL_AND_PIECEWISE", "drafts": 1},
    "preempt": {"small": True},
    "all-heads": {"indexer": {"MISA_INDEXER": "misa", "MISA_HEADS": "64"}},
    "piecewise": {"graphs": "PIECEWISE"},
    "mtp4": {"graphs": "FULL_AND_PIECEWISE", "drafts": 3},
    "glm-all-heads": {"indexer": {"MISA_INDEXER": "misa", "MISA_HEADS": "32"}, "kind": "glm"},
    "sketch": {"graphs": "FULL_AND_PIECEWISE", "indexer": SKETCH, "exact": False},
    "hisa": {"graphs": "FULL_AND_PIECEWISE", "indexer": {"MISA_INDEXER": "hisa"}, "exact": False},
    "offload": {
        "graphs": "FULL_AND_PIECEWISE",
        "indexer": {"MISA_INDEXER": "hisa"},
        "exact": False,
        "offload": True,
    },
    "offload-sketch": {"indexer": SKETCH, "exact": False, "offload": True},
    "misa": {"indexer": {"MISA_INDEXER": "misa", "MISA_DECODE": "1"}, "exact": False},
}

LENGTHS, NEW, BATCHED = (50, 3000, 9000, 1500, 15000), 24, 4096
SEQUENCES = 8


def prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(8, checkpoint.VOCABULARY, (n,), generator=generator).tolist() for n in lengths
    ]


def engine(mode: dict[str, Any], folder: Path) -> Any:
    from vllm import LLM

    kind, drafts = mode.get("kind", "v32"), mode.get("drafts", 0)
    length = 4096 if mode.get("small") else 16384
    model = folder / "models" / f"{kind}-{min(drafts, 1)}"
    checkpoint.write(model, kind, drafts=min(drafts, 1))
    options: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "max_model_len": length,
        "max_num_batched_tokens": BATCHED,
        "max_num_seqs": SEQUENCES,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 1 << 30,
        "seed": 0,
        "disable_log_stats": False,
        "enforce_eager": "graphs" not in mode,
    }
    if "graphs" in mode:
        # Batches are padded to these sizes; vLLM 0.26 gives rows of padding negative lengths if a
        # sequence has several, which its own kernels take for large ones.
        counts = range(1, SEQUENCES + 1) if drafts else (1, 2, 4, SEQUENCES)
        sizes = [(drafts + 1) * n for n in counts]
        options["compilation_config"] = {
            "cudagraph_mode": mode["graphs"],
            "cudagraph_capture_sizes": sizes,
        }
    if mode.get("fp8"):
        options["kv_cache_dtype"] = "fp8"
        options["attention_config"] = {"backend": "FLASHMLA_SPARSE"}
    if drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    if mode.get("small"):
        options["num_gpu_blocks_override"] = 165
    if mode.get("offload"):
        options |= {"kv_offloading_size": 2, "num_gpu_blocks_override": 500}
    return LLM(**options)


def generate(llm: Any, ids: list[list[int]], new: int) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)


def metric(llm: Any, name: str, **labels: str) -> int:
    found = (m for m in llm.get_metrics() if m.name == name)
    return sum(int(m.value) for m in found if labels.items() <= m.labels.items())


def serve_all(llm: Any, recorder: Any, mode: dict[str, Any], result: dict[str, Any]) -> None:
    """The requests of a mode; what comes goes into `result` as it comes."""
    if mode.get("small"):
        generate(llm, prompts((2540, 2540, 2540, 2540), seed=0), 150)
        result["preempted"] = metric(llm, "vllm:num_preemptions")
        return
    ids = prompts(LENGTHS, seed=0)
    outs = generate(llm, ids, NEW)
    if mode.get("offload"):
        generate(llm, prompts(LENGTHS, seed=6), NEW)  # takes the pages of the first ones
    # The prompt of 9000 tokens with what came after it, which are cached, and 700 more.
    again = ids[2] + list(outs[2].outputs[0].token_ids) + prompts((700,), seed=7)[0]
    outs = generate(llm, [again], NEW)
    result["cached"] = [out.num_cached_tokens for out in outs]
    # Not external_prefix_cache_hits: vLLM drops what is counted in a step that only loads.
    source = {"source": "external_kv_transfer"}
    result["loaded"] = metric(llm, "vllm:prompt_tokens_by_source", **source)
    if mode.get("timed"):
        recorder.times = {}
        generate(llm, prompts((100,) * SEQUENCES, seed=8), 550)
        result["host_us"] = {
            name: round(statistics.median(times) * 1e6, 1) for name, times in recorder.times.items()
        }
        result["host_us"]["calls"] = len(recorder.times["misa"])


def empty_result(name: str) -> dict[str, Any]:
    return {"mode": name, "preempted": 0, "cached": [], "loaded": 0, "up": 0, "faults": []}


def run(name: str, folder: Path) -> dict[str, Any]:
    mode = MODES[name]
    result = empty_result(name)
    os.environ.update(mode.get("indexer", DSA), MISA_STRICT="1")
    from record import Recorder

    from misa.integrations import vllm as plugin

    recorder = Recorder(2 * SEQUENCES * (mode.get("drafts", 0) + 1))
    recorder.compared = mode.get("exact", True)
    before: dict[str, int] = {}
    start = time.monotonic()
    try:
        recorder.install()
        llm = engine(mode, folder)
        result["up"] = round(time.monotonic() - start, 1)
        before = plugin.counters()
        recorder.start()
        start = time.monotonic()
        serve_all(llm, recorder, mode, result)
    except Exception as error:
        traceback.print_exc()
        result["faults"].append(f"the engine: {type(error).__name__}: {str(error)[:300]}")
    result["served"] = round(time.monotonic() - start, 1)
    result["counters"] = {k: n - before.get(k, 0) for k, n in plugin.counters().items()}
    for work in ("prefill", "decode"):
        result[work] = recorder.tally[work].summary()
    result["faults"] += faults(result, mode)
    return result


def faults(result: dict[str, Any], mode: dict[str, Any]) -> list[str]:
    """What is not as promised."""
    found = []
    counters = result["counters"]
    for work in ("prefill", "decode"):
        tally = result[work]
        found += tally["faults"]
        if tally["rows"] - tally["short"] < 20:
            found.append(f"{work}: only {tally['rows'] - tally['short']} long rows were judged")
        if not tally["replayed"]:
            found.append(f"{work}: no row was replayed")
        if not counters.get(f"misa_{work}"):
            found.append(f"{work}: no row is counted for MISA")
        if counters.get(f"engine_{work}"):
            found.append(f"{work}: {counters[f'engine_{work}']} rows were left to the engine")
        # Two selections by FP8 products differ from each other at most as both do from the exact
        # one; a row's last position or two are the resolution.
        apart = 1 - tally["overlap"]
        if mode.get("exact", True) and apart > 2 * tally["engine_beside_exact"] + 1e-3:
            found.append(f"{work}: {apart:.5f} of the positions are not the engine's")
    if (mode.get("small") or mode.get("retract")) and not result["preempted"]:
        found.append("no sequence was preempted")
    if not mode.get("small") and not any(result["cached"]):
        found.append("no prefix was found in the cache")
    if mode.get("offload") and not result["loaded"]:
        found.append("no page came back from host memory")
    padded = "FULL" in mode.get("graphs", "") and not mode.get("drafts")
    if padded and not result["decode"]["padding"]:
        found.append("no row padded a batch")
    return found


def finish(folder: Path, result: dict[str, Any]) -> int:
    """Writes a mode's result for table.py; the exit status."""
    name, failed = result["mode"], bool(result["faults"])
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1))
    print(f"-- {name}: {'FAILED' if failed else 'PASSED'}", flush=True)
    return 1 if failed else 0


def main() -> int:
    name, folder = sys.argv[1], Path(sys.argv[2])
    with (folder / "bench.lock").open("w") as running:
        fcntl.flock(running, fcntl.LOCK_SH)  # bench/engine/measure.py waits for the GPU
        result = run(name, folder)
    return finish(folder, result)


if __name__ == "__main__":
    sys.exit(main())
