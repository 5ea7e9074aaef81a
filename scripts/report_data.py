# SPDX-License-Identifier: Apache-2.0
"""The figures of bench/results by what they are of."""

from __future__ import annotations

import functools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


class Record(NamedTuple):
    name: str
    commit: str
    date: str
    machine: dict[str, Any]
    command: str
    results: Any
    transcribed: bool = False
    note: str = ""


class Figure(NamedTuple):
    value: float
    low: float | None = None
    high: float | None = None


USED: set[str] = set()


@functools.cache
def load(name: str) -> Record | None:
    """A file of bench/results, if there is one."""
    path = RESULTS / f"{name}.json"
    return Record(name, **json.loads(path.read_text())) if path.exists() else None


def record(name: str) -> Record:
    found = load(name)
    if found is None:
        raise SystemExit(f"report.py: a table needs bench/results/{name}.json")
    USED.add(name)
    return found


def exists(name: str) -> bool:
    return load(name) is not None


def matching(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """The entries of a list of results that have these values."""
    entries = record(name).results
    return [e for e in entries if all(e.get(key) == value for key, value in wanted.items())]


def us(name: str, **wanted: Any) -> Figure | None:
    """Microseconds of a step; the median of several entries, which are rounds."""
    entries = [e for e in matching(name, **wanted) if "us" in e]
    if not entries:
        return None
    lows, highs = ([e[key] for e in entries if key in e] for key in ("us_low", "us_high"))
    return Figure(
        statistics.median(e["us"] for e in entries),
        min(lows, default=None),
        max(highs, default=None),
    )


def step(indexer: str, keys: int, heads: int = 64) -> Figure | None:
    """A prefill step of 2048 queries: not right after dense ones, if that was measured."""
    for name in (f"gpu-sparse-{heads}", f"gpu-steps-{heads}"):
        found = us(name, indexer=indexer, keys=keys)
        if found:
            return found
    return None


def rate(indexer: str, keys: int, heads: int = 64) -> float | None:
    """TFLOP/s of the same step."""
    for name in (f"gpu-sparse-{heads}", f"gpu-steps-{heads}"):
        for entry in matching(name, indexer=indexer, keys=keys):
            if "tflops" in entry:
                return entry["tflops"]
    return None


def peers(keys: int, heads: int = 64) -> dict[str, Figure]:
    """Microseconds of DeepGEMM's logits and of selectors, by name."""
    shapes = record("gpu-peers").results["shapes"]
    shape = next(s for s in shapes if (s["keys"], s["heads"]) == (keys, heads))
    selectors = shape["selectors_us"]
    return {
        "logits": of_rounds(shape["logits_us"], shape, "logits alone"),
        **{name: of_rounds(us, shape, name) for name, us in selectors.items()},
    }


def decode_peers(batch: int, context: int = 131072, heads: int = 64) -> dict[str, Any]:
    for end in ("", "-short", "-32", "-32-batch"):
        for shape in record(f"gpu-decode-peers{end}").results["shapes"]:
            if (shape["batch"], shape["context"], shape["heads"]) == (batch, context, heads):
                return shape
    raise SystemExit(f"report.py: no peers for B = {batch}, L = {context}, {heads} heads")


def of_rounds(median: float, shape: dict[str, Any], name: str) -> Figure:
    """A median of peers.py with the least and the greatest round, if it told them."""
    rounds = shape.get("rounds_us", {}).get(name, [])
    return Figure(median, min(rounds, default=None), max(rounds, default=None))


def decode(indexer: str, batch: int, context: int = 131072, heads: int = 64) -> Figure | None:
    """A decode step, from the runs with peers."""
    shape = decode_peers(batch, context, heads)
    found = shape["misa_us"].get(indexer)
    return None if found is None else of_rounds(found, shape, f"misa {indexer}")


def recall(indexer: str) -> float:
    """Mean recall in per cent on the trace that README.md names."""
    for name in ("recall", "recall-fp8"):
        for found in record(name).results["traces"][0]["indexers"]:
            if found["name"] == indexer:
                return 100 * found["recall"]["mean"]
    raise SystemExit(f"report.py: no recall of {indexer}")


def cpu_ms(indexer: str, dtype: str = "e4m3", keys: int = 65536) -> Figure | None:
    """Milliseconds of a whole step on the CPU."""
    for context in record(f"cpu-steps-{dtype}").results["contexts"]:
        for found in context["indexers"]:
            if (context["keys"], found["name"]) == (keys, indexer):
                time = found["seconds_step"]
                half = time.get("spread")
                return Figure(
                    1e3 * time["median"],
                    None if half is None else 1e3 * (time["median"] - half),
                    None if half is None else 1e3 * (time["median"] + half),
                )
    return None


def cpu_peers() -> dict[str, Figure]:
    """Milliseconds of a query of the dense step of others, and of indexers in turn with them."""
    results = record("cpu-peers").results
    found = {}
    for name, seconds in results["seconds"].items():
        ms = [1e3 * s / results["queries"] for s in seconds]
        low, high = (min(ms), max(ms)) if len(ms) > 1 else (None, None)
        found[name] = Figure(statistics.median(ms), low, high)
    return found


def stage_ms(stage: str, name: str = "cpu-stages") -> Figure:
    """Milliseconds of a stage or peer of misa_bench, and their standard deviation."""
    ms = {
        found["aggregate_name"]: found["real_time"]
        for found in record(name).results["benchmarks"]
        if found["run_name"].startswith(stage + "/") and found["run_type"] == "aggregate"
    }
    if "median" not in ms:
        raise SystemExit(f"report.py: no {stage} in {name}.json")
    median, deviation = ms["median"], ms["stddev"]
    return Figure(median, median - deviation, median + deviation)


def stages(indexer: str, keys: int) -> dict[str, float]:
    """Microseconds of the stages of step(indexer, keys) with 64 heads."""
    for name in ("gpu-sparse-64", "gpu-steps-64"):
        for entry in matching(name, indexer=indexer, keys=keys):
            return entry["stages"]
    raise SystemExit(f"report.py: no stages of {indexer}")


def cpu_floor(name: str) -> Figure:
    """GFLOP/s of a bare loop, with the slowest and the fastest run."""
    found = record("cpu-floors").results
    return Figure(found[name], found[f"{name}_low"], found[f"{name}_high"])


def gpu() -> str:
    devices = record("gpu-decode-peers").machine["devices"]
    return devices.split(" x ", 1)[1]


def cpu() -> str:
    machine = record("cpu-steps-e4m3").machine
    return f"{machine['threads']} threads of an {machine['processor']}"
