#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times the dense step of others on the shapes of misa_bench_step: DeepGEMM's FP8 MQA logits (the
package sgl-deep-gemm), then the faster of torch.topk and, where flashinfer-python is installed,
FlashInfer's top-k. Medians of 20 runs between CUDA events, after 5 that are not counted; all of
them in turn for --rounds rounds, of whose medians the median is printed and, as JSON, all are.

With --decode, on those of misa_bench_decode: DeepGEMM's paged logits and a top-k, also misa.top_k
where it is installed, measured as misa_bench_decode measures (its head says how). The schedule of
the logits, which an engine makes once for all layers, is left out of a step. With --misa PROGRAM,
that is misa_bench_decode, both are run in turn and printed side by side."""

import argparse
import importlib.metadata
import inspect
import itertools
import json
import statistics
import subprocess

import deep_gemm
import torch

try:
    import flashinfer
except ImportError:
    flashinfer = None

try:
    import misa
except ImportError:
    misa = None

DIM = 128
PAGE = 64
COLD_BYTES = 100_000_000  # read before a cache is read again, as in misa_bench_decode
MOST_CACHES = 256
LEAST_STEPS = 8  # of a graph
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


def versions():
    found = {}
    for name in ("torch", "sgl-deep-gemm", "flashinfer-python", "misa"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def step(queries, heads, keys, options):
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
    selectors = {"torch.topk": lambda: torch.topk(scores, options.top_k, dim=-1, sorted=False)}
    if flashinfer is not None:
        selectors["FlashInfer"] = lambda: flashinfer.top_k_ragged_transform(
            scores, starts, ends, options.top_k
        )

    rounds = {name: [] for name in ("logits alone", *selectors)}
    for _ in range(options.rounds):
        for name, run in {"logits alone": logits, **selectors}.items():
            rounds[name].append(microseconds(run))
    medians = {name: median(us) for name, us in rounds.items()}
    alone = medians.pop("logits alone")
    return {
        "queries": queries,
        "heads": heads,
        "keys": keys,
        "top_k": options.top_k,
        "rounds": options.rounds,
        "logits_us": alone,
        "selectors_us": medians,
        "dense_us": alone + min(medians.values()),
        "rounds_us": rounds,
    }


def print_step(result):
    selectors = result["selectors_us"]
    each = ", ".join(f"{name} {us:.1f} us" for name, us in selectors.items())
    print(
        "{heads} heads, {keys} keys: logits {logits_us:.1f} us, ".format(**result)
        + f"{each}, with {min(selectors, key=selectors.get)} {result['dense_us']:.1f} us"
    )


class LeftOut(Exception):
    """Why a shape or a selector was not measured."""


class Decode:
    """A batch of sequences of equal length in the shuffled pages of several caches."""

    def __init__(self, batch, context, next_n, heads, options):
        self.context, self.top_k = context, options.top_k
        each = -(-context // PAGE)
        key_bytes = batch * context * (DIM + 4)
        bytes_of_a_cache = batch * (each * options.page_stride + options.table // PAGE * 4)
        room = torch.cuda.mem_get_info()[0] - (3 << 30)
        wanted = 1 + -(-COLD_BYTES // key_bytes)
        self.caches = min(wanted, room // bytes_of_a_cache, MOST_CACHES)
        if self.caches < (1 if key_bytes >= 4 * COLD_BYTES else 2):
            raise LeftOut(
                f"a cache takes {bytes_of_a_cache // 10**6} MB, "
                "more than the device has free for two"
            )
        self._fill_pages(self.caches * batch * each, options.page_stride)
        self.tables = torch.zeros(
            self.caches, batch, options.table // PAGE, dtype=torch.int32, device="cuda"
        )
        order = torch.randperm(self.caches * batch * each, device="cuda").int()
        self.tables[:, :, :each] = order.view(self.caches, batch, each)
        self.q = torch.randn(batch, next_n, heads, DIM, device="cuda").to(torch.float8_e4m3fn)
        self.w = torch.randn(batch * next_n, heads, device="cuda")
        rows = torch.arange(context - next_n + 1, context + 1, dtype=torch.int32, device="cuda")
        self.lengths = rows.repeat(batch, 1)
        if next_n > 2:  # as vLLM does on Hopper, where the kernel takes one or two queries
            self.q = self.q.flatten(0, 1).unsqueeze(1)
            self.lengths = self.lengths.view(-1, 1)
            self.tables = self.tables.repeat_interleave(next_n, dim=1)
        try:
            self._schedule(self.lengths)
        except RuntimeError:  # older versions take the lengths of sequences
            self._schedule(self.lengths[:, -1].contiguous())

    def _fill_pages(self, pages, stride):
        """The elements of pages repeat, but every key has a scale of its own."""
        self.pool = torch.zeros(pages, stride, dtype=torch.uint8, device="cuda")
        drawn = torch.randn(512, PAGE * DIM, device="cuda").to(torch.float8_e4m3fn)
        drawn = drawn.view(torch.uint8)
        for first in range(0, pages, len(drawn)):
            part = self.pool[first : first + len(drawn)]
            part[:, : PAGE * DIM] = drawn[: len(part)]
            scales = (torch.rand(len(part), PAGE, device="cuda") + 0.5).view(torch.uint8)
            part[:, PAGE * DIM : PAGE * (DIM + 4)] = scales
        self.cache = self.pool.as_strided((pages, PAGE, 1, DIM + 4), (stride, DIM + 4, DIM + 4, 1))

    def _schedule(self, lengths):
        self.context_lens = lengths
        self.schedule = self._new_schedule()
        self.logits(0)
        torch.cuda.synchronize()

    def _new_schedule(self):
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        return deep_gemm.get_paged_mqa_logits_metadata(self.context_lens, PAGE, sms)

    def logits(self, cache):
        return deep_gemm.fp8_paged_mqa_logits(
            self.q, self.cache, self.w, self.context_lens, self.tables[cache], self.schedule,
            self.context, clean_logits=False,
        )  # fmt: skip

    def selectors(self):
        """Functions of the logits, by name."""
        lengths = self.lengths.flatten().contiguous()
        zeros = torch.zeros_like(lengths)
        found = {"torch.topk": lambda scores: torch.topk(scores, self.top_k, dim=-1, sorted=False)}
        if flashinfer is not None:
            call = flashinfer.top_k_ragged_transform
            safe = "dsa_graph_safe" in inspect.signature(call).parameters
            extra = {"dsa_graph_safe": True} if safe else {}
            found["FlashInfer"] = lambda scores: call(
                scores.contiguous(), zeros, lengths, self.top_k, **extra
            )
        if hasattr(misa, "top_k"):
            found["misa.top_k"] = lambda scores: misa.top_k(scores, self.top_k, lengths=lengths)
        return found

    def microseconds(self, select=None):
        """Of a step: the logits, and a selection from them."""

        def step(cache):
            scores = self.logits(cache)
            return scores if select is None else select(scores)

        return self._replayed(step)

    def schedule_microseconds(self):
        return self._replayed(lambda _: self._new_schedule())

    def _replayed(self, step):
        """Microseconds of a step in a graph of steps that take all caches in turn."""
        steps = -(-LEAST_STEPS // self.caches) * self.caches
        step(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(steps):
                step(i % self.caches)
        return microseconds(graph.replay) / steps


def decode_step(batch, context, next_n, heads, options):
    """Microseconds of the logits, of the logits with each selector, and of the schedule."""
    inputs = Decode(batch, context, next_n, heads, options)
    steps, failed = {}, {}
    for name, select in inputs.selectors().items():
        if context < options.top_k:
            failed[name] = "fewer keys than top-k"
            continue
        try:
            steps[f"logits + {name}"] = inputs.microseconds(select)
        except RuntimeError as error:
            failed[name] = str(error).splitlines()[0]
    steps = {"logits alone": inputs.microseconds(), **steps}
    return inputs.caches, inputs.schedule_microseconds(), steps, failed


def misa_steps(batch, context, next_n, heads, options):
    """{indexer: entry} that misa_bench_decode prints."""
    flags = {"batch": batch, "context": context, "next-n": next_n, "heads": heads,
             "top-k": options.top_k, "page-stride": options.page_stride,
             "table": options.table}  # fmt: skip
    command = [options.misa, "--json", "--indexers", *options.indexers]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {entry["indexer"]: entry for entry in json.loads(done.stdout)}


def median(values):
    return statistics.median(values) if values else None


def decode_shape(batch, context, next_n, heads, options):
    """The medians over all rounds, for one shape."""
    result = {"batch": batch, "context": context, "next_n": next_n, "heads": heads,
              "top_k": options.top_k, "rounds": options.rounds}  # fmt: skip
    schedules, peers, ours = [], {}, {}
    for _ in range(options.rounds):
        if options.misa:
            for name, entry in misa_steps(batch, context, next_n, heads, options).items():
                if "left_out" in entry:
                    result.setdefault("left_out", {})[name] = entry["left_out"]
                else:
                    ours.setdefault(name, []).append(entry["us"])
        try:
            caches, schedule, steps, failed = decode_step(batch, context, next_n, heads, options)
        except LeftOut as reason:
            result.setdefault("left_out", {})["peers"] = str(reason)
            continue
        finally:
            torch.cuda.empty_cache()
        result["caches"] = caches
        if failed:
            result.setdefault("left_out", {}).update(failed)
        schedules.append(schedule)
        for name, us in steps.items():
            peers.setdefault(name, []).append(us)
    medians = {name: median(us) for name, us in peers.items()}
    result["schedule_us"] = median(schedules)
    result["logits_us"] = medians.pop("logits alone", None)
    result["steps_us"] = medians
    result["dense_us"] = min(medians.values(), default=None)
    result["misa_us"] = {name: median(us) for name, us in ours.items()}
    result["rounds_us"] = {**peers, **{f"misa {name}": us for name, us in ours.items()}}
    return result


def print_decode(result):
    shape = "B = {batch}, L = {context}, next_n = {next_n}, {heads} heads".format(**result)
    print(f"{shape}, {result.get('caches', 0)} caches, medians of {result['rounds']} rounds")
    if result["logits_us"] is not None:
        print(f"  {'schedule, left out of steps':28} {result['schedule_us']:9.1f} us")
        print(f"  {'logits alone':28} {result['logits_us']:9.1f} us")
    for name, us in result["steps_us"].items():
        print(f"  {name:28} {us:9.1f} us")
    for name, us in result["misa_us"].items():
        dense = result["dense_us"]
        ratio = f", {us / dense:.2f} of the peers' step" if dense is not None else ""
        print(f"  {'misa ' + name:28} {us:9.1f} us{ratio}")
    for name, reason in result.get("left_out", {}).items():
        print(f"  {name:28} left out: {reason}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--heads", type=int, nargs="+", default=[64])
    parser.add_argument("--keys", type=int, nargs="+", default=[65536])
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--decode", action="store_true")
    of_decode = parser.add_argument_group("with --decode")
    of_decode.add_argument("--batch", type=int, nargs="+", default=[64])
    of_decode.add_argument("--context", type=int, nargs="+", default=[131072])
    of_decode.add_argument("--next-n", type=int, nargs="+", default=[1])
    of_decode.add_argument("--page-stride", type=int, default=11264, help="bytes")
    of_decode.add_argument("--table", type=int, default=1 << 20, help="tokens of a row")
    of_decode.add_argument("--misa", metavar="PROGRAM", help="misa_bench_decode")
    of_decode.add_argument("--indexers", nargs="+", default=["dsa", "misa"], help="of --misa")
    options = parser.parse_args()
    if options.decode:
        shapes = itertools.product(options.batch, options.context, options.next_n, options.heads)
        measure, show = decode_shape, print_decode
    else:
        shapes = itertools.product([options.queries], options.heads, options.keys)
        measure, show = step, print_step
    results = []
    for shape in shapes:
        results.append(measure(*shape, options))
        if not options.json:
            show(results[-1])
    if options.json:
        print(json.dumps({"versions": versions(), "shapes": results}, indent=2))


if __name__ == "__main__":
    main()
