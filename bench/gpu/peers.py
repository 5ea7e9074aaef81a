#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times the dense step of others on the shapes of misa_bench_step: DeepGEMM's FP8 MQA logits (the
package sgl-deep-gemm), then the faster of torch.topk and, where flashinfer-python is installed,
FlashInfer's top-k. Medians of 20 runs between CUDA events, after 5 that are not counted."""

import argparse
import itertools
import json
import statistics

import deep_gemm
import torch

try:
    import flashinfer
except ImportError:
    flashinfer = None

DIM = 128
WARM_UP = 5
RUNS = 20


def microseconds(run):
    for _ in range(WARM_UP):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    for i, event in enumerate(events):
        event.record()
        if i < RUNS:
            run()
    torch.cuda.synchronize()
    return statistics.median(1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events))


def step(queries, heads, keys, top_k):
    """Microseconds of the logits and of each selector, for the last queries of a context."""
    device = "cuda"
    q = torch.randn(queries, heads, DIM, device=device).to(torch.float8_e4m3fn)
    w = torch.randn(queries, heads, device=device)
    k = torch.randn(keys, DIM, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(keys, device=device) + 0.5
    starts = torch.zeros(queries, dtype=torch.int32, device=device)
    ends = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32, device=device)

    def logits():
        return deep_gemm.fp8_mqa_logits(q, (k, scale), w, starts, ends, clean_logits=False)

    # Columns that a query does not see are not written; selectors are given the lengths.
    scores = torch.nan_to_num(logits(), nan=float("-inf"))
    selectors = {"torch.topk": lambda: torch.topk(scores, top_k, dim=-1, sorted=False)}
    if flashinfer is not None:
        selectors["FlashInfer"] = lambda: flashinfer.top_k_ragged_transform(
            scores, starts, ends, top_k
        )

    return microseconds(logits), {name: microseconds(run) for name, run in selectors.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--heads", type=int, nargs="+", default=[64])
    parser.add_argument("--keys", type=int, nargs="+", default=[65536])
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for heads in options.heads:
        for keys in options.keys:
            logits, selectors = step(options.queries, heads, keys, options.top_k)
            fastest = min(selectors, key=selectors.get)
            dense = logits + selectors[fastest]
            results.append(
                {
                    "queries": options.queries,
                    "heads": heads,
                    "keys": keys,
                    "top_k": options.top_k,
                    "logits_us": logits,
                    "selectors_us": selectors,
                    "dense_us": dense,
                }
            )
            if not options.json:
                each = ", ".join(f"{name} {us:.1f} us" for name, us in selectors.items())
                print(
                    f"{heads} heads, {keys} keys: logits {logits:.1f} us, {each}, "
                    f"with {fastest} {dense:.1f} us"
                )
    if options.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
