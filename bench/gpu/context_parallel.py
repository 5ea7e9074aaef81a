#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times misa.distributed.select on the GPUs of this machine, one process each, against misa.select
on one of them: prefill of T queries behind a context, L keys in all, e4m3, 64 heads of 128
dimensions. Prints a Markdown table of ms a call, or JSON:

- split: whether the work is split by keys or by queries.
- one GPU: misa.select with all keys.
- N GPUs: with shards and without check, calls that follow each other, as an engine's layers do;
  and how many times as fast that is as one GPU.
- host: what the host takes to start such a call.
- checked: with shards, every call waited for.
- agreed: without shards, every call waited for."""

import argparse
import itertools
import json
import statistics
import time
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

import misa.distributed

HEADS, DIM = 64, 128
INDEXERS = {
    "DSA": misa.Config("dsa"),
    "MISA 8": misa.Config("misa", heads=8),
    "MISA-R 3 + 1, m = 4096": misa.Config("misa-r", heads=3, candidates=4096),
    "HISA": misa.Config("hisa"),
}
WARM_UP, CALLS, ROUNDS = 3, 10, 3


class Dealt(NamedTuple):
    lengths: list[int]
    positions: torch.Tensor | None
    known: misa.distributed.Shards


def dealt(layout, length, ranks):
    """Keys dealt to the ranks."""
    every = torch.arange(length, device="cuda")
    if layout == "even":
        parts = every.tensor_split(ranks)
    elif layout == "uneven":
        parts = every.tensor_split([length // (ranks + 1) * i for i in range(1, ranks)])
    elif layout == "zigzag":
        chunks = every.tensor_split(2 * ranks)
        parts = [torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(ranks)]
    else:
        width = int(layout.removeprefix("stripes of "))
        parts = [every[every // width % ranks == rank] for rank in range(ranks)]
    lengths = [len(part) for part in parts]
    positions = None if layout in ("even", "uneven") else torch.cat(list(parts))
    return Dealt(lengths, positions, misa.distributed.Shards(lengths, positions))


def arrays(tokens, length):
    """q, w, k, ks, ke and k_scale, the same on every rank."""
    generator = torch.Generator("cuda").manual_seed(length + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    q = normal(tokens, HEADS, DIM).to(torch.float8_e4m3fn)
    k = normal(length, DIM).to(torch.float8_e4m3fn)
    scale = torch.rand(length, generator=generator, device="cuda") + 0.5
    ke = torch.arange(length - tokens + 1, length + 1, dtype=torch.int32, device="cuda")
    return q, normal(tokens, HEADS), k, torch.zeros_like(ke), ke, scale


def times(call, host_group):
    """Ms a call of calls that are waited for, of such as follow each other, and what the host takes
    for one of these, each of some rounds."""

    def started():
        torch.cuda.synchronize()
        dist.barrier(host_group)
        return time.perf_counter()

    def since(start):
        return (time.perf_counter() - start) * 1e3

    waited, followed, host = [], [], []
    for i in range(1 + ROUNDS):
        for _ in range(WARM_UP):
            start = started()
            call()
            torch.cuda.synchronize()
            waited.append(since(start))
        start = started()
        for _ in range(CALLS):
            call()
        host.append(since(start) / CALLS)
        torch.cuda.synchronize()
        followed.append(since(start) / CALLS)
        if i == 0:
            waited, followed, host = [], [], []
    return waited, followed, host


def measured(given, shards, rank, config, host_group):
    """Ms a call by what was called, in rounds; `given` are the arrays of :func:`arrays`."""
    q, w, k, ks, ke, scale = given
    start = sum(shards.lengths[:rank])
    mine = slice(start, start + shards.lengths[rank])
    if shards.positions is not None:
        mine = shards.positions[mine]
    k_local = k.view(torch.uint8)[mine].view(k.dtype)
    alone = partial(misa.select, q, w, k, ks, ke, k_scale=scale, config=config)
    agreed = partial(
        misa.distributed.select, q, w, k_local, ks, ke, k_scale=scale[mine], config=config
    )
    checked = partial(agreed, shards=shards.known)
    if not torch.equal(alone().indices.sort().values, checked().indices.sort().values):
        raise SystemExit(f"{config}: the selection is not that of one rank")
    _, one, _ = times(alone, host_group)
    _, many, host = times(partial(checked, check=False), host_group)
    found = {"one": one, "many": many, "host": host, "checked": times(checked, host_group)[0]}
    if shards.positions is None:
        found["agreed"] = times(agreed, host_group)[0]
    return found


def cells_of(entry):
    """A row of the Markdown table."""
    one, many = entry["one_ms"], entry["many_ms"]
    numbers = [one, many, one / many, entry["host_ms"], entry["checked_ms"]]
    if "agreed_ms" in entry:
        numbers.append(entry["agreed_ms"])
    what = (entry["tokens"], f"{entry['keys'] >> 10}K", entry["layout"], entry["indexer"])
    return [*what, entry["split"], *[*(f"{number:.2f}" for number in numbers), "-"][:6]]


def run(rank, options):
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{options.port}",
        rank=rank,
        world_size=options.ranks,
        device_id=torch.device("cuda", rank),
    )
    host_group = dist.new_group(backend="gloo")

    def show(*cells):
        if rank == 0 and not options.json:
            print("|", " | ".join(map(str, cells)), "|", flush=True)

    head = ("T", "L", "keys", "indexer", "split", "one GPU", f"{options.ranks} GPUs",
            "times as fast", "host", "checked", "agreed")  # fmt: skip
    show(*head)
    show(*["---"] * len(head))
    entries = []
    for tokens, length in itertools.product(options.tokens, options.keys):
        given = arrays(tokens, length)
        for layout in options.layouts:
            shards = dealt(layout, length, options.ranks)
            for name, config in INDEXERS.items():
                by_keys = misa.distributed.splits_keys(given[0], config, shards.known)
                split = "keys" if by_keys else "queries"
                entry = {"tokens": tokens, "keys": length, "layout": layout, "indexer": name,
                         "ranks": options.ranks, "split": split}  # fmt: skip
                rounds = measured(given, shards, rank, config, host_group)
                entry.update({f"{key}_ms": statistics.median(ms) for key, ms in rounds.items()})
                entries.append({**entry, "rounds_ms": rounds})
                show(*cells_of(entry))
    if rank == 0 and options.json:
        print(json.dumps(entries, indent=2))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16])
    parser.add_argument("--keys", type=int, nargs="+", default=[1 << 20, 1 << 17])
    parser.add_argument(
        "--layouts", nargs="+", default=["even"], help="even, uneven, zigzag, stripes of N"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--port", type=int, default=29511)
    options = parser.parse_args()
    torch.multiprocessing.spawn(run, args=(options,), nprocs=options.ranks)


if __name__ == "__main__":
    main()
