# SPDX-License-Identifier: Apache-2.0
"""PyTorch on the CPU as a peer: the same dense and routed steps in plain PyTorch.

Run it on the machine of misa_bench; prints medians. Needs torch.
"""

import argparse
import json
import statistics
import time

import torch


def dense_scores(q, w, k):
    """q [T, H, D], w [T, H], k [L, D] -> [T, L], in tiles of keys so that H x L stays small."""
    tiles = []
    for tile in k.split(4096):
        dots = (q.flatten(0, 1) @ tile.T).float().view(q.shape[0], q.shape[1], -1)
        tiles.append(torch.einsum("th,thl->tl", w, dots.relu_()))
    return torch.cat(tiles, dim=1)


def median_seconds(step, runs):
    step()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--keys", type=int, default=65536)
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    q = torch.randn(args.queries, args.heads, 128).bfloat16()
    w = torch.randn(args.queries, args.heads) * 0.01
    k = torch.randn(args.keys, 128).bfloat16()
    scores = torch.randn(args.queries, args.keys)

    steps = {
        "dense scores": lambda: dense_scores(q, w, k),
        "8 heads, scores": lambda: dense_scores(q[:, :8].contiguous(), w[:, :8], k),
        "topk": lambda: scores.topk(args.top_k, dim=1),
        "dense step": lambda: dense_scores(q, w, k).topk(args.top_k, dim=1),
    }
    medians = {name: median_seconds(step, args.runs) * 1e3 for name, step in steps.items()}
    threads = torch.get_num_threads()
    print(json.dumps({"torch": torch.__version__, "threads": threads, "ms": medians}))


if __name__ == "__main__":
    main()
