#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Serves a small random model with SGLang, its indexer replaced by MISA's, and judges every layer.

    serve_sglang.py MODE FOLDER     MODE: one of MODES; FOLDER: for models, results and logs

Writes FOLDER/MODE.json and prints PASSED or FAILED. SGLang's scheduler runs in a process of its
own, where record_sglang.py records and judges.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

for name, value in {
    "SGLANG_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    # Short prompts are attended like the others: dense attention would need FlashAttention 3.
    "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0",
}.items():
    os.environ.setdefault(name, value)

import checkpoint  # noqa: E402
from record_sglang import Recorder, run_scheduler_process  # noqa: E402
from serve import (  # noqa: E402
    BATCHED,
    DSA,
    LENGTHS,
    NEW,
    SEQUENCES,
    empty_result,
    faults,
    finish,
    prompts,
)

# indexer: MISA_* variables. graphs: decode in full graphs, and prefill of up to 2048 tokens in
# graphs that break at the indexer, as SGLang does by default. fp8: a cache in FP8; indices of
# prefill then point into gathered keys. unfused: indices are positions, else slots of the cache.
# retract: every tenth step takes a sequence's pages, which begins again later. drafts: tokens that
# a random draft model proposes; what is judged is their verification, in the model's own layers.
# exact: whether the positions are the engine's, up to rounding.
MODES: dict[str, dict[str, Any]] = {
    "graphs": {"graphs": "FULL"},
    "eager": {},
    "glm": {"graphs": "FULL", "kind": "glm"},
    "glm-shared": {"graphs": "FULL", "kind": "glm-shared"},
    "fp8": {"graphs": "FULL", "fp8": True},
    "mtp2": {"graphs": "FULL", "drafts": 1},
    "mtp4": {"graphs": "FULL", "drafts": 3},
    "all-heads": {"indexer": {"MISA_INDEXER": "misa", "MISA_HEADS": "64"}},
    "glm-all-heads": {"indexer": {"MISA_INDEXER": "misa", "MISA_HEADS": "32"}, "kind": "glm"},
    "unfused": {"unfused": True},
    "retract": {"retract": True},
    "misa": {"graphs": "FULL", "indexer": {"MISA_INDEXER": "misa"}, "exact": False},
    "hisa": {"graphs": "FULL", "indexer": {"MISA_INDEXER": "hisa"}, "exact": False},
}


def engine(mode: dict[str, Any], folder: Path) -> Any:
    from sglang.srt.entrypoints.engine import Engine

    class Recorded(Engine):
        run_scheduler_process_func = staticmethod(run_scheduler_process)

    kind, fp8, graphs = mode.get("kind", "v32"), mode.get("fp8", False), "graphs" in mode
    drafts, draft = mode.get("drafts", 0), {}
    model = folder / "models" / f"{kind}-{'experts' if drafts else 0}"
    checkpoint.write(model, kind, drafts=min(drafts, 1), experts=drafts > 0)
    if drafts:
        draft = {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": drafts,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": drafts + 1,
        }
    return Recorded(
        model_path=str(model),
        skip_tokenizer_init=True,
        context_length=Recorder.context,
        chunked_prefill_size=BATCHED,
        max_running_requests=SEQUENCES,
        max_total_tokens=1 << 16,
        mem_fraction_static=0.5,
        random_seed=0,
        sampling_backend="pytorch",
        grammar_backend="none",
        kv_cache_dtype="fp8_e4m3" if fp8 else "bfloat16",
        dsa_prefill_backend="flashmla_sparse",
        dsa_decode_backend="flashmla_kv" if fp8 else "flashmla_sparse",
        disable_decode_cuda_graph=not graphs,
        disable_prefill_cuda_graph=not graphs,
        cuda_graph_bs_decode=[1, 2, 4, SEQUENCES],
        cuda_graph_bs_prefill=[256, 1024, 2048],
        log_level="info",
        **draft,
    )


def generate(served: Any, ids: list[list[int]]) -> list[dict[str, Any]]:
    params = {"temperature": 0.0, "max_new_tokens": NEW, "ignore_eos": True}
    return served.generate(input_ids=ids, sampling_params=params)


def run(name: str, folder: Path) -> dict[str, Any]:
    mode = MODES[name]
    result = empty_result(name)
    os.environ.update(mode.get("indexer", DSA), MISA_STRICT="1", MISA_DECODE="1")
    if mode.get("unfused"):
        os.environ["SGLANG_DSA_FUSE_TOPK"] = "0"
    if mode.get("retract"):
        os.environ |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "10"}
    start = time.monotonic()
    served = engine(mode, folder)
    result["up"] = round(time.monotonic() - start, 1)
    served.collective_rpc("misa_start", compared=mode.get("exact", True))
    start = time.monotonic()
    try:
        ids = prompts(LENGTHS, seed=0)
        outs = generate(served, ids)
        # The prompt of 9000 tokens with what came after it, which are cached, and 700 more.
        again = ids[2] + list(outs[2]["output_ids"]) + prompts((700,), seed=7)[0]
        outs = generate(served, [again])
        result["cached"] = [out["meta_info"]["cached_tokens"] for out in outs]
    except Exception as error:
        traceback.print_exc()
        result["faults"].append(f"the engine: {type(error).__name__}: {str(error)[:300]}")
    result["served"] = round(time.monotonic() - start, 1)
    path = folder / f"{name}.judged"
    served.collective_rpc("misa_report", path=str(path))
    served.shutdown()
    result |= json.loads(path.read_text())
    result["faults"] += faults(result, mode)
    return result


def main() -> int:
    name, folder = sys.argv[1], Path(sys.argv[2])
    return finish(folder, run(name, folder))


if __name__ == "__main__":
    sys.exit(main())
