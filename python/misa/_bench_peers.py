# SPDX-License-Identifier: Apache-2.0
"""The command misa-bench-peers.

It runs as a file too, without the package: what it times of this library is the program misa.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import torch
except ImportError as error:
    raise SystemExit(f"misa-bench-peers: {error}; pip install torch") from None

DIM = 128
KEYS_A_TILE = 4096

Step = Callable[[], Any]


class Missing(Exception):
    """Why a peer cannot run."""


class Busy(NamedTuple):
    """The share of the time that misa waited for a processor, and what it says of it."""

    waited: float
    warning: str | None


def torch_step(q: torch.Tensor, w: torch.Tensor, k: torch.Tensor, top_k: int) -> Step:
    """q [T, H, D], w [T, H], k [L, D], in tiles of keys so that H x L products stay small."""
    q, k = q.bfloat16(), k.bfloat16()

    def step() -> torch.Tensor:
        tiles = []
        for tile in k.split(KEYS_A_TILE):
            dots = (q.flatten(0, 1) @ tile.T).float().view(q.shape[0], q.shape[1], -1)
            tiles.append(torch.einsum("th,thl->tl", w, dots.relu_()))
        return torch.cat(tiles, dim=1).topk(top_k, dim=1).indices

    return step


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """Functions of libggml-base and libggml-cpu, all of which take and give pointers."""

    F32, F16 = 0, 1  # enum ggml_type
    CALLS = 100  # of a step, at most

    def __init__(self) -> None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.submodule_search_locations is None:
            raise Missing("llama-cpp-python is not installed")
        folder = Path(next(iter(found.submodule_search_locations))) / "lib"
        try:
            self._libraries = [
                ctypes.CDLL(str(folder / f"libggml-{name}.so"), mode=ctypes.RTLD_GLOBAL)
                for name in ("base", "cpu")
            ]
        except OSError as error:
            raise Missing(str(error)) from error
        if not hasattr(self._libraries[0], "ggml_lightning_indexer"):
            raise Missing("this llama-cpp-python has no ggml_lightning_indexer")

    def call(self, name: str, *arguments: Any, result: Any = ctypes.c_void_p) -> Any:
        library = next(lib for lib in self._libraries if hasattr(lib, name))
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    def tensor(self, context: Any, kind: int, values: torch.Tensor) -> Any:
        """A tensor of four dimensions with these values, the last one adjacent."""
        sizes = [1] * (4 - values.dim()) + list(values.shape)
        dimensions = [ctypes.c_int64(n) for n in reversed(sizes)]
        made = self.call("ggml_new_tensor_4d", ctypes.c_void_p(context), kind, *dimensions)
        data = self.call("ggml_get_data", ctypes.c_void_p(made))
        values = values.contiguous()
        ctypes.memmove(data, values.data_ptr(), values.numel() * values.element_size())
        return ctypes.c_void_p(made)

    def step(self, q: torch.Tensor, w: torch.Tensor, k: torch.Tensor, top_k: int) -> Step:
        tokens, keys = q.shape[0], k.shape[0]
        # Inputs, mask and scores; then a graph and, out of it in every call, the work memory, less
        # than 16 bytes a key and thread.
        size = 4 * q.numel() + 2 * k.numel() + tokens * keys * 6 + (64 << 20)
        size += self.CALLS * 16 * keys * torch.get_num_threads()
        context = ctypes.c_void_p(self.call("ggml_init", InitParams(size, None, False)))
        mask = torch.zeros(tokens, keys, dtype=torch.float16)
        scores = self.call(
            "ggml_lightning_indexer",
            context,
            self.tensor(context.value, self.F32, q),
            self.tensor(context.value, self.F16, k.half()[:, None]),
            self.tensor(context.value, self.F32, w),
            self.tensor(context.value, self.F16, mask),
        )
        chosen = self.call("ggml_top_k", context, ctypes.c_void_p(scores), top_k)
        graph = ctypes.c_void_p(self.call("ggml_new_graph", context))
        self.call("ggml_build_forward_expand", graph, ctypes.c_void_p(chosen), result=None)
        data = self.call("ggml_get_data", ctypes.c_void_p(chosen))
        threads = torch.get_num_threads()

        def step() -> torch.Tensor:
            self.call("ggml_graph_compute_with_ctx", context, graph, threads, result=ctypes.c_int)
            array = (ctypes.c_int32 * (tokens * top_k)).from_address(data)
            return torch.frombuffer(array, dtype=torch.int32).view(tokens, top_k)

        return step


def misa_turn(program: str, options: argparse.Namespace) -> tuple[dict[str, float], Busy]:
    """One turn of `misa bench`: the medians of its runs by indexer, and how busy it was."""
    command = [program, "bench", "--json", "--dtype", "BF16", "--runs", str(options.runs)]
    for name in ("queries", "heads", "keys", "top_k"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--threads", str(torch.get_num_threads()), "--indexers", options.indexers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr or f"misa-bench-peers: {program} ended with {done.returncode}")
    result = json.loads(done.stdout)
    (context,) = result["contexts"]
    seconds = {one["label"]: one["seconds_step"]["median"] for one in context["indexers"]}
    return seconds, Busy(context["waited_for_processor"] or 0, result["warning"])


def size(text: str) -> int:
    """A whole number, K, M or G after it for 2^10, 2^20 or 2^30 times as many, as for misa."""
    digits, unit = (
        (text[:-1], text[-1].upper()) if text[-1:].upper() in tuple("KMG") else (text, "")
    )
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
        raise argparse.ArgumentTypeError(
            f"expected 1 or more, K, M or G after it or not, got {text!r}"
        )
    return int(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def seconds(step: Step, runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def own_program() -> str | None:
    """The program misa that was installed with the package, or another one on the path."""
    return shutil.which("misa", path=sysconfig.get_path("scripts")) or shutil.which("misa")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="misa-bench-peers",
        description="Times the dense step of others on the CPU, in turn with misa bench on the "
        "same shapes, bf16 and random data. torch: products of oneDNN, then torch.topk. ggml: what "
        "llama.cpp runs, ggml_lightning_indexer and ggml_top_k on f16 keys, from the libraries of "
        "llama-cpp-python. Peers that are not installed are left out, and said so. Times are "
        "medians of rounds, in each of which every contender runs once, and ± is half the distance "
        "between the quartiles. `misa bench --peer` calls this command.",
        epilog="Example: misa-bench-peers --keys 16K --queries 8 --indexers dsa,misa-r",
    )
    parser.add_argument("--peers", nargs="*", choices=("torch", "ggml"), default=["torch", "ggml"])
    parser.add_argument(
        "--misa", metavar="PROGRAM", default=own_program(), help="(default: %(default)s)"
    )
    parser.add_argument("--indexers", default="dsa,misa,misa-r:h=3:m=4k", help="of misa bench")
    parser.add_argument("--queries", type=size, default=32, help="(default: %(default)s)")
    parser.add_argument("--heads", type=size, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--keys", type=size, default=65536, help="64K is 65536 (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=size, default=2048, help="(default: %(default)s)")
    parser.add_argument("--threads", type=size, default=os.cpu_count())
    parser.add_argument("--runs", type=size, default=1, help="of a contender in a round")
    parser.add_argument("--rounds", type=size, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)

    if options.runs * options.rounds >= Ggml.CALLS:
        parser.error(f"--runs times --rounds: expected less than {Ggml.CALLS}")
    if options.top_k > options.keys:
        parser.error(f"--top-k: expected at most --keys = {options.keys}, got {options.top_k}")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    q = torch.randn(options.queries, options.heads, DIM)
    w = torch.randn(options.queries, options.heads) * 0.01
    k = torch.randn(options.keys, DIM)
    steps: dict[str, Step] = {}
    for peer in options.peers:
        try:
            make = torch_step if peer == "torch" else Ggml().step
            steps[peer] = make(q, w, k, options.top_k)
            steps[peer]()
        except Missing as missing:
            print(f"{peer} was left out: {missing}", file=sys.stderr)
    if options.misa is None:
        print("misa was left out: expected --misa, or the program on the path", file=sys.stderr)
    rounds: dict[str, list[float]] = {}
    busiest = Busy(0, None)
    for _ in range(options.rounds):
        turn = {peer: seconds(step, options.runs) for peer, step in steps.items()}
        if options.misa:
            own, busy = misa_turn(options.misa, options)
            turn |= own
            busiest = max(busiest, busy, key=lambda one: one.waited)
        for name, took in turn.items():
            rounds.setdefault(name, []).append(took)
    if busiest.warning:
        print(f"misa-bench-peers: {busiest.warning}", file=sys.stderr)
    shape = {name: getattr(options, name) for name in ("queries", "heads", "keys", "top_k")}
    if options.json:
        found = {"torch": torch.__version__, "threads": options.threads, **shape}
        found |= {"waited_for_processor": busiest.waited, "warning": busiest.warning}
        print(json.dumps(found | {"seconds": rounds}, indent=1))
        return
    print(", ".join(f"{name} {value}" for name, value in shape.items()), end="")
    print(f", {options.threads} threads, medians of {options.rounds} rounds, ms")
    for name, times in rounds.items():
        half = "–"
        if len(times) > 1:
            low, _, high = statistics.quantiles(times, n=4)
            half = f"{(high - low) / 2 * 1e3:.2f}"
        print(f"  {name:<24} {statistics.median(times) * 1e3:9.2f} ± {half}")


if __name__ == "__main__":
    main()
