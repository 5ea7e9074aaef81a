# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and docs/performance.md, a function each: text from bench/results."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterable

import report_data as data
from report_data import Figure

M4096 = "misa-r:h=3:m=2k"
SKETCH = "misa-r:h=3:m=4k:sketch=2"
SKETCH_LONG = "misa-r:h=3:m=8k:sketch=2"
SKETCH_4 = "dsa:m=2k:sketch=4"
SKETCH_TOP_K = (2048, 512, 256)
LABELS = {
    "dsa": "DSA",
    "misa": "MISA 8",
    "misa-dagger": "MISA† 8, m = 8192",
    "hisa": "HISA 64 × 128",
    "misa-r": "MISA-R 7 + 1",
    M4096: "MISA-R 3 + 1, m = 4096",
    SKETCH: "MISA-R 3 + 1 on the 2-bit sketch, m = 8192",
    SKETCH_LONG: "the same, m = 16,384",
    SKETCH_4: "all heads on the 4-bit sketch, m = 4096",
    "auto": "`auto`",
}
STEPS = ("dsa", "misa", "misa-dagger", "hisa", "misa-r", M4096)
BATCHES = (1, 4, 16, 64)
TOP_K = "logits + misa.top_k"
TORCH = "logits + torch.topk"
K64, K128 = 65536, 131072


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head)]
    cells += [["---"] * len(cells[0]), *map(list, rows)]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in cells)


def read() -> set[str]:
    """The results that tables have read."""
    return data.USED


def number(value: float, like: float | None = None) -> str:
    """Three digits or all of a whole number; with as many decimals as `like` would have."""
    size = value if like is None else like
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def shown(figure: Figure | float | None) -> str:
    if figure is None:
        return ""
    if isinstance(figure, float | int):
        return number(figure)
    if figure.low is None or figure.high is None:
        return number(figure.value)
    return f"{number(figure.value)} ± {number((figure.high - figure.low) / 2, figure.value)}"


def times(ratio: float) -> str:
    return f"{ratio:.1f} ×" if ratio >= 3 else f"{ratio:.2f} ×"


def keys_of(count: int) -> str:
    return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}K"


def added(a: Figure, b: Figure) -> Figure:
    """Of what runs one after the other; without a spread where one has none."""
    spread = a.low is not None and b.low is not None
    low, high = (a.low + b.low, a.high + b.high) if spread else (None, None)
    return Figure(a.value + b.value, low, high)


def value(figure: Figure | None) -> float:
    if figure is None:
        raise SystemExit("report.py: a target has no figure")
    return figure.value


def dense(keys: int, heads: int = 64) -> float:
    """Microseconds of the peers' dense step: the logits, then the fastest selector."""
    peers = {name: us.value for name, us in data.peers(keys, heads).items()}
    return peers.pop("logits") + min(peers.values())


# Bytes a token and layer in a cache (docs/formats.md), of keys of 128 elements: e4m3 with a scale
# in fp32, the sums in fp32 of each 64 keys, and a sketch with scales in fp16.
KEY_BYTES = 128 + 4
SUM_BYTES = 4 * 128 // 64


def sketch_bytes(bits: int) -> int:
    return 128 * bits // 8 + 2


def indexers() -> str:
    with_sums = KEY_BYTES + SUM_BYTES
    what = {
        "dsa": ("DSA", "64 heads", KEY_BYTES),
        "misa": ("MISA", "8 heads, routed by block means", with_sums),
        "misa-dagger": ("MISA† (m = 8192)", "8 heads, then 64 on the candidates", with_sums),
        "hisa": ("HISA", "64 heads on 64 blocks of 128", with_sums),
        "misa-r": ("MISA-R", "7 heads + 1 linear row", KEY_BYTES),
        M4096: (
            "MISA-R (m = 4096)",
            "3 heads + 1 linear row, then 64 on the candidates",
            KEY_BYTES,
        ),
        SKETCH: (
            "MISA-R (m = 8192), 2-bit sketch",
            "the same, the rows on a sketch",
            KEY_BYTES + sketch_bytes(2),
        ),
    }
    rows = []
    for name, (label, scores, cache) in what.items():
        on_cpu, on_gpu = data.cpu_ms(name), data.step(name, K64)
        rows.append(
            [label, scores, f"{data.recall(name):.1f} %",
             f"{on_cpu.value / 256 * 1e3:.0f}" if on_cpu else "",
             f"{on_gpu.value / 2048:.2f}" if on_gpu else "",
             f"{value(data.decode(name, 64)):.0f}", str(cache)]
        )  # fmt: skip
    peer = "DeepGEMM's logits + "
    every = ["64 heads", "all, by definition", ""]
    cache = str(KEY_BYTES)
    decode = data.decode_peers(64)["steps_us"]
    rows.append([f"{peer}FlashInfer's top-k", *every, f"{dense(K64) / 2048:.2f}", "", cache])
    rows.append([f"{peer}this library's top-k", *every, "", f"{decode[TOP_K]:.0f}", cache])
    rows.append([f"{peer}`torch.topk`", *every, "", f"{decode[TORCH]:.0f}", cache])
    name = data.gpu().removeprefix("NVIDIA ")
    head = ["indexer", "what scores a token", f"recall of DSA's set, {recall_keys()}"]
    head += ["CPU µs per query, 64K", f"{name} µs per query, 64K"]
    head += [f"{name} µs per decode step, 128K", "cache bytes per token"]
    return table(head, rows)


def indexers_machines() -> str:
    floor = 64 * K128 * KEY_BYTES / data.record("gpu-floors").results["copy_tbps"] * 1e-6
    return (
        "Recall: mean over the rows of `data/trace_h64_layer3.safetensors`, a small trained\n"
        f"model's indexer with a context of {recall_keys()}, top 2048. There m = 8192 candidates "
        "are half of the\nkeys, at 128K a sixteenth. Recall depends on the model: measure yours.\n"
        "Time: a whole step at 64 heads × 128, e4m3, 65,536 keys, top 2048, on "
        f"{data.cpu()}\nand on one {data.gpu()}, there 2048 queries a call.\n"
        "A decode step has 64 sequences of 131,072 tokens, a query each, in pages with sums: "
        f"reading {KEY_BYTES} bytes\nof every token at the rate of a copy takes {floor:.0f} µs."
    )


def commands() -> str:
    """The commands behind the table of indexers, as they were recorded but for --json."""
    records = ("recall", "recall-fp8", "cpu-steps-e4m3", "gpu-steps-64", "gpu-sparse-64")
    lines = [data.record(name).command for name in (*records, "gpu-decode-peers", "gpu-peers")]
    # The last is of a program that was called by its name alone.
    lines[-1] = lines[-1].replace("peers.py", "python3 bench/gpu/peers.py", 1)
    text = "\n".join(line.replace(" --json", "") for line in lines)
    return f"```sh\n{text}\n```"


def recall_keys() -> str:
    """The context of the trace that README.md names."""
    return keys_of(data.record("recall").results["traces"][0]["keys"])


def picture() -> str:
    return (
        "![Recall against time: each indexer's recall of DSA's set, and the time of a decode step\n"
        "and of a prefill step on the GPU and of a step on the CPU, with the dense step of other\n"
        "libraries](docs/plots/recall-time.svg)\n\n"
        "The indexer `auto` is DSA up to 16K keys at 64 heads, and MISA-R with m = 4096 beyond."
    )


def recall_time() -> str:
    return picture().replace("docs/plots", "plots")


def summary() -> str:
    steps = data.decode_peers(64)["steps_us"]
    decoded = {name: value(data.decode(name, 64)) for name in ("dsa", "hisa", SKETCH)}
    speed = {n: times(dense(K64) / value(data.step(n, K64))) for n in ("dsa", "misa", M4096)}
    floors = data.record("gpu-floors").results
    share = {n: 100 * (data.rate(n, K64) or 0) / floors["products_tflops"] for n in ("dsa", "misa")}
    read = 64 * K128 * KEY_BYTES / floors["copy_tbps"] * 1e-6
    verdicts = [row[-1] for row in target_rows()]
    return "\n".join(
        [
            f"- **Decode**, 64 sequences of 128K tokens: DSA takes {decoded['dsa']:.0f} µs, where "
            f"DeepGEMM's logits take {steps[TOP_K]:.0f} with\n  this library's top-k and "
            f"{steps[TORCH]:.0f} with `torch.topk`. HISA is "
            f"{times(steps[TOP_K] / decoded['hisa'])} as fast as the former, MISA-R with\n"
            f"  m = 8192 on the 2-bit sketch {times(steps[TOP_K] / decoded[SKETCH])}.",
            "- **Prefill**, 64K keys, against DeepGEMM's logits with FlashInfer's top-k: DSA "
            f"{speed['dsa']}, MISA-R with m = 4096\n  {speed[M4096]}, MISA {speed['misa']}.",
            f"- **Recall**, on a trace of {recall_keys()} keys, shorter than the contexts of these "
            f"times: MISA {data.recall('misa'):.1f} %, HISA {data.recall('hisa'):.1f} %,\n  MISA-R "
            f"with m = 4096 {data.recall(M4096):.1f} %, with m = 8192 on the 2-bit sketch "
            f"{data.recall(SKETCH):.1f} %, where m is half of the keys.",
            f"- **Floors**: that prefill reaches {share['dsa']:.0f} % of the rate of products "
            f"alone with DSA, {share['misa']:.0f} % with MISA; that decode step\n  of DSA "
            f"{100 * read / decoded['dsa']:.0f} % of the rate of a copy.",
            f"- **Missed** are {len(verdicts) - verdicts.count('met')} of {len(verdicts)} "
            "[targets](#targets), most of them of decode.",
        ]
    )


# Sequences and tokens of each, of what is measured with 32 heads.
HEADS_32 = [(1, 1 << bits) for bits in range(12, 17)] + [(16, K128), (64, K128)]


def decode_plot() -> str:
    return (
        "![Time of a decode step by the number of sequences, for each indexer, the peers and the\n"
        "floor](plots/decode.svg)"
    )


def decode() -> str:
    shapes = {batch: data.decode_peers(batch) for batch in BATCHES}
    copy = data.record("gpu-floors").results["copy_tbps"]
    last = shapes[64]["steps_us"][TOP_K]

    def row(label: str, cells: list[Figure | float | None], ratio: bool = True) -> list[str]:
        end = cells[-1]
        us = end.value if isinstance(end, Figure) else end
        return [label, *map(shown, cells), times(last / us) if ratio and us else ""]

    rows = [
        row(
            "read keys and scales once",
            [b * K128 * KEY_BYTES / copy * 1e-6 for b in BATCHES],
            False,
        )
    ]
    for name in (*STEPS, SKETCH, SKETCH_LONG, SKETCH_4):
        rows.append(row(LABELS[name], [data.decode(name, batch) for batch in BATCHES]))
    alone = [data.of_rounds(s["logits_us"], s, "logits alone") for s in shapes.values()]
    rows.append(row("DeepGEMM's logits alone", alone, False))
    for name, label in ((TORCH, "`torch.topk`"), (TOP_K, "`misa.top_k`")):
        steps = [data.of_rounds(s["steps_us"][name], s, name) for s in shapes.values()]
        rows.append(row(f"DeepGEMM's logits, then {label}", steps))
    head = ("µs a step", *(f"B = {b}" for b in BATCHES), "speed, B = 64")
    return table(head, rows)


def decode_at(indexer: str, batch: int, context: int) -> Figure | None:
    """A decode step of the short and the long context."""
    if context == 8192:
        return data.decode(indexer, batch, context)
    return data.us("gpu-decode-1m", indexer=indexer, batch=batch, context=context)


def decode_shapes() -> str:
    names = ("dsa", "misa", SKETCH)
    rows = []
    for batch in (64, 256):
        shape = data.decode_peers(batch, 8192)
        peer = data.of_rounds(shape["steps_us"][TOP_K], shape, TOP_K)
        cells = [decode_at(name, batch, 8192) for name in names]
        rows.append([f"L = 8K, B = {batch}", *map(shown, cells), shown(peer)])
    for batch, context in HEADS_32:
        shape = data.decode_peers(batch, context, 32)
        peer = data.of_rounds(shape["steps_us"][TOP_K], shape, TOP_K)
        cells = [data.decode(name, batch, context, 32) for name in names]
        what = f"32 heads, L = {keys_of(context)}, B = {batch}"
        rows.append([what, *map(shown, cells), shown(peer)])
    cells = [data.us("gpu-decode-next-4", indexer=name, next_n=4) for name in names]
    rows.append(["L = 128K, B = 64, four queries a sequence", *map(shown, cells), ""])
    cells = [decode_at(name, 1, 1 << 20) for name in names]
    rows.append(["L = 1M, B = 1", *map(shown, cells), ""])
    head = ("µs a step", "DSA", "MISA 8", "2-bit sketch, m = 8192", "logits, then `misa.top_k`")
    return table(head, rows)


def prefill_plot() -> str:
    return (
        "![Time of a prefill step at 64K and 128K keys, for each indexer and the peers, with the\n"
        "floor of each](plots/prefill.svg)"
    )


def prefill_of(heads: int) -> str:
    floor = data.record("gpu-floors").results["products_tflops"]
    rows = []
    for name in STEPS:
        cells = [LABELS[name]]
        for keys in (K64, K128):
            step = data.step(name, keys, heads)
            if step is None:
                break
            rate = data.rate(name, keys, heads)
            share = f"{100 * rate / floor:.0f} %" if rate else ""
            cells += [shown(step), times(dense(keys, heads) / step.value), share]
        else:
            rows.append(cells)
    for name in data.peers(K64, heads):
        if name == "logits":
            continue
        cells = [
            f"DeepGEMM's logits, then {'`torch.topk`' if 'torch' in name else name + chr(39) + 's'}"
        ]
        for keys in (K64, K128):
            peers = data.peers(keys, heads)
            step = added(peers["logits"], peers[name])
            cells += [shown(step), times(dense(keys, heads) / step.value), ""]
        rows.append(cells)
    head = [f"{heads} heads"]
    for keys in (K64, K128):
        head += [f"L = {keys_of(keys)}, µs", "speed", "of the floor"]
    return table(head, rows)


def contexts_plot() -> str:
    return "![Time of a prefill step from 2K to 1M keys](plots/contexts.svg)"


def contexts() -> str:
    short = (2048, 4096, 8192, 16384, 32768, K64)
    rows = [
        [LABELS[name], *(shown(data.us("gpu-short", indexer=name, keys=k)) for k in short)]
        for name in ("dsa", "misa", "auto")
    ]
    return table(("µs a step", *map(keys_of, short)), rows)


def long_contexts() -> str:
    long = (1 << 18, 1 << 19, 1 << 20)
    rows = [
        [LABELS[name], *(shown(data.us("gpu-long", indexer=name, keys=k)) for k in long)]
        for name in ("misa", M4096, "misa-dagger")
    ]
    return table(("µs a step", *map(keys_of, long)), rows)


def queries() -> str:
    counts = sorted({entry["queries"] for entry in data.record("gpu-queries").results})
    rows = [
        [keys_of(keys), *(shown(data.us("gpu-queries", queries=t, keys=keys)) for t in counts)]
        for keys in (4096, K64, K128)
    ]
    return table(("MISA 8, µs", *(f"T = {t}" for t in counts)), rows)


def selector() -> str:
    copy = data.record("gpu-floors").results["copy_tbps"]
    rows = []
    for entry in data.record("gpu-select").results:
        name = entry["name"]
        if not name.startswith("top_k ") or name.endswith("scores"):
            continue
        rows_by_keys, k = name.removeprefix("top_k ").split(", k ")
        peers: dict[str, Figure] = {}
        for keys in (K64, K128):
            if (rows_by_keys, k) == (f"2048 x {keys}", "2048"):
                peers = data.peers(keys)
        rows.append(
            [rows_by_keys.replace("x", "×"), k,
             shown(Figure(entry["us"], entry["us_low"], entry["us_high"])),
             f"{100 * entry['bytes'] / copy * 1e-6 / entry['us']:.0f} %",
             shown(peers.get("FlashInfer")), shown(peers.get("torch.topk"))]
        )  # fmt: skip
    head = ("rows × scores", "k", "`misa::cuda::top_k`, µs", "of a copy's rate", "FlashInfer, µs",
            "`torch.topk`, µs")  # fmt: skip
    return table(head, rows)


# Variants of bench/engine.sh, and the bytes a token and layer that they keep beside the cache.
ENGINE = {
    "engine": ("vLLM's own", ""),
    "dsa": ("`dsa`", "0"),
    "misa-r": ("`misa-r`, 3 heads", "0"),
    "misa-r-m": ("`misa-r`, 3 heads, 4096 re-ranked", "0"),
    "sketch": ("the same on a 2-bit sketch", str(sketch_bytes(2))),
    "hisa": ("`hisa`", str(SUM_BYTES)),
}


def engine() -> str:
    variants = data.record("engine").results["variants"]
    one = next(iter(variants.values()))
    head = ["indexer", *(f"first token of {int(n):,}, ms" for n in one["first"])]
    head += [f"a step of decode at B = {batch} on the device, ms" for batch in one["next"]]
    head += ["of it the indexer in a layer, µs", "more memory, bytes a token and layer"]
    rows = []
    for name, (label, memory) in ENGINE.items():
        if name not in variants:
            continue
        found = variants[name]
        steps = found["next"].values()
        cells = [f"{ms:.0f}" for ms in found["first"].values()]
        cells += [f"{step['device_ms']:.2f}" for step in steps]
        indexer = ", ".join(f"{step['indexer_us']:.0f}" for step in steps)
        rows.append([label, *cells, indexer, memory])
    return table(head, rows)


def engine_tokens() -> str:
    variants = data.record("engine").results["variants"]
    next_of = {name: found["next"] for name, found in variants.items()}
    in_turn = {name: found for name, found in next_of.items() if "token_ms_of_turns" in found["1"]}
    spans = []
    for batch in next_of["engine"]:
        ms = [found[batch]["token_ms"] for found in in_turn.values()]
        spans.append(f"{min(ms):.1f} to {max(ms):.1f} ms at B = {batch}")
    text = (
        "With two layers the host takes longer than the device: a token of each sequence took "
        f"{', '.join(spans)}, with vLLM's own indexer as with the others that took turns with it."
    )
    for name in next_of.keys() - in_turn.keys():
        ms = ", ".join(f"{found['token_ms']:.1f}" for found in next_of[name].values())
        text += f" In a run of its own, without turns, {ENGINE[name][0]} took {ms} ms."
    return textwrap.fill(text, 105)


def engine_line() -> str:
    results = data.record("engine").results
    variants = results["variants"]
    first = {name: found["first"]["131072"] for name, found in variants.items()}
    next_64 = {name: found["next"]["64"]["device_ms"] for name, found in variants.items()}
    text = (
        f"In vLLM {results['vllm']}, on two layers of random weights, the first token of 131,072 "
        f"takes {first['misa-r-m']:.0f} ms with MISA-R and m = 4096, where vLLM's own indexer "
        f"takes {first['engine']:.0f}. A step of decode for 64 such sequences takes "
        f"{next_64['hisa']:.2f} ms on the device with HISA and {next_64['sketch']:.2f} with MISA-R "
        f"on the 2-bit sketch, where vLLM's own takes {next_64['engine']:.2f}."
    )
    return textwrap.fill(text, 105)


# Modes of tests/engine.sh: the model with its indexer, and how it is served.
GRAPHS = "full and piecewise CUDA graphs"
BREAKABLE = "full CUDA graphs, prefill in breakable ones"
SERVED_VLLM = {
    "full": ("V3.2, `dsa`", GRAPHS),
    "piecewise": ("V3.2, `dsa`", "piecewise CUDA graphs alone"),
    "eager": ("V3.2, `dsa`", "eager"),
    "fp8": ("V3.2, `dsa`", f"fp8 cache, {GRAPHS}"),
    "mtp2": ("V3.2, `dsa`", f"MTP, 2 queries a step, {GRAPHS}"),
    "mtp4": ("V3.2, `dsa`", f"MTP, 4 queries a step, {GRAPHS}"),
    "preempt": ("V3.2, `dsa`", "a cache too small: a sequence preempted, eager"),
    "glm": ("GLM, `dsa`", GRAPHS),
    "glm-shared": ("GLM, a layer that shares another's selection, `dsa`", GRAPHS),
    "all-heads": ("V3.2, `misa` with 64 heads", "eager"),
    "glm-all-heads": ("GLM, `misa` with 32 heads", "eager"),
    "misa": ("V3.2, `misa`", "decode too, eager"),
    "hisa": ("V3.2, `hisa`", f"page sums beside the cache, {GRAPHS}"),
    "sketch": ("V3.2, `misa-r` on a 2-bit sketch, re-ranked", GRAPHS),
    "offload": ("V3.2, `hisa`", f"pages come back from host memory, {GRAPHS}"),
    "offload-sketch": ("V3.2, `misa-r` on a 2-bit sketch, re-ranked", "the same, eager"),
}
SERVED_SGLANG = {
    "graphs": ("V3.2, `dsa`", BREAKABLE),
    "eager": ("V3.2, `dsa`", "eager"),
    "fp8": ("V3.2, `dsa`", f"fp8 cache, {BREAKABLE}"),
    "unfused": ("V3.2, `dsa`", "positions in place of slots, eager"),
    "mtp2": ("V3.2, `dsa`", f"a draft model, 2 queries a step verified, {BREAKABLE}"),
    "mtp4": ("V3.2, `dsa`", f"a draft model, 4 queries a step verified, {BREAKABLE}"),
    "retract": ("V3.2, `dsa`", "sequences retracted, eager"),
    "glm": ("GLM, `dsa`", BREAKABLE),
    "glm-shared": ("GLM, a layer that shares another's selection, `dsa`", BREAKABLE),
    "all-heads": ("V3.2, `misa` with 64 heads", "eager"),
    "glm-all-heads": ("GLM, `misa` with 32 heads", "eager"),
    "misa": ("V3.2, `misa`", BREAKABLE),
    "hisa": ("V3.2, `hisa`", BREAKABLE),
}


def engine_host() -> str:
    host = data.record("served-vllm-0.33.0").results["modes"]["eager"]["host_us"]
    text = (
        f"In vLLM 0.33.0 an eager call of the operator took {host['misa']:.0f} µs of the host at 8 "
        f"sequences, where vLLM's own took {host['engine']:.0f} (medians of {host['calls']} calls, "
        f"other modes running beside it); {host['selection']:.0f} µs of it are MISA's selection, "
        "the rest is vLLM's insertion of keys and reading its metadata. A replayed call takes none."
    )
    return textwrap.fill(text, 105)


def served(labels: dict[str, tuple[str, str]], *records: str) -> str:
    """What tests/engine.sh judged, a column for each engine."""
    engines = [data.record(name).results for name in records]
    names = [results["engine"].split(",")[0].split()[1] for results in engines]
    head = ["mode", "model, indexer", "how"]
    for name in names:
        head += [f"{name}: long rows, prefill and decode", "the engine's own positions"]
    rows = []
    for mode, (model, how) in labels.items():
        row = [f"`{mode}`", model, how]
        for results in engines:
            found = results["modes"].get(mode)
            if found is None:
                row += ["not run", ""]
                continue
            if found["faults"]:
                raise SystemExit(f"report.py: {mode} has not passed: {found['faults']}")
            works = [found[work] for work in ("prefill", "decode")]
            row.append(", ".join(str(work["rows"] - work["short"]) for work in works))
            least = 100 * min(work["overlap"] for work in works)
            row.append("all" if least == 100 else f"{least:.{4 if least > 99.9 else 1}f} %")
        rows.append(row)
    return table(head, rows)


def context_parallel() -> str:
    names = ("gpu-context-parallel", "gpu-context-parallel-layouts")
    entries = [entry for name in names for entry in data.record(name).results]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for e in entries:
        shape = (f"{e['tokens']:,}", keys_of(e["keys"]), e["layout"])
        one, many = e["one_ms"], e["many_ms"]
        cell = f"{one:.2f} / {many:.2f}, {times(one / many)}"
        by_keys = " by keys" if e["split"] == "keys" else ""
        rows.setdefault(shape, {})[e["indexer"]] = cell + by_keys
    indexers = list(dict.fromkeys(entry["indexer"] for entry in entries))
    head = ["T", "L", f"keys of {entries[0]['ranks']} GPUs", *indexers]
    return table(
        head, ([*shape, *(row.get(name, "") for name in indexers)] for shape, row in rows.items())
    )


def cpu() -> str:
    rows = []
    for name in STEPS:
        cells = [LABELS[name]]
        for dtype in ("bf16", "e4m3"):
            step, full = data.cpu_ms(name, dtype), data.cpu_ms("dsa", dtype)
            cells += [shown(step), times(value(full) / value(step))]
        rows.append(cells)
    return table(("a step", "bf16, ms", "against DSA", "e4m3, ms", "against DSA"), rows)


def cpu_peers() -> str:
    onednn, scores = "peer/onednn_matmul_bf16", "score/dense/bf16"
    one = "cpu-stages-1"
    pairs = [
        ("products of 64 heads, one thread", "oneDNN, bf16", data.stage_ms(onednn, one),
         "scores of DSA", data.stage_ms(scores, one)),
        ("the same, all threads", "oneDNN, bf16", data.stage_ms(onednn),
         "scores of DSA", data.stage_ms(scores)),
        ("a row of 65,536", "`std::nth_element`", data.stage_ms("peer/nth_element"),
         "selection", data.stage_ms("select/2048")),
    ]  # fmt: skip
    turns = data.cpu_peers()
    names = {"torch": "PyTorch", "ggml": "llama.cpp (ggml)"}
    pairs += [
        ("a dense step, a query", label, turns[name], "DSA", turns["DSA"])
        for name, label in names.items()
        if name in turns
    ]
    rows = [
        [what, peer, shown(theirs), mine, shown(ms), times(theirs.value / ms.value)]
        for what, peer, theirs, mine, ms in pairs
    ]  # fmt: skip
    return table(("", "peer", "ms", "MISA", "ms", "speed"), rows)


def at_most(what: str, bound: float, us: float) -> list[str]:
    verdict = "met" if us <= bound else "**missed**"
    return [f"{what} ≤ {bound:,.0f} µs", f"{number(us)} µs", verdict]


def at_least(what: str, bound: float, ratio: float) -> list[str]:
    return [what, times(ratio), "met" if ratio >= bound else "**missed**"]


def kept_by_sketch(name: str, top_k: int) -> tuple[float, float]:
    """The recall of an indexer on a sketch, in per cent: the mean of all traces, and the least."""
    traces = data.record(f"recall-sketch-{top_k}").results["traces"]
    each = [100 * found["recall"]["mean"] for trace in traces for found in trace["indexers"]
            if found["name"] == name]  # fmt: skip
    return statistics.fmean(each), min(each)


def sketch_recall() -> str:
    rows = []
    for top_k in SKETCH_TOP_K:
        traces = data.record(f"recall-sketch-{top_k}").results["traces"]
        lengths = sorted({trace["keys"] // top_k for trace in traces})
        each = [kept_by_sketch(name, top_k) for name in (SKETCH, SKETCH_LONG, SKETCH_4)]
        rows.append([f"{top_k:,}", " and ".join(map(str, lengths)),
                     *(f"{mean:.2f} %, {least:.2f} %" for mean, least in each)])  # fmt: skip
    head = ("top k", "keys / k", "2 bits, m = 4 k", "2 bits, m = 8 k", "4 bits, m = 2 k")
    return table(head, rows)


def target_rows() -> list[list[str]]:
    rows = []

    def faster(name: str, keys: int, bound: float, heads: int = 64) -> None:
        what = (
            f"{LABELS[name]} of {heads} heads, {keys_of(keys)}: ≥ {bound:g} × the peers' dense step"
        )
        rows.append(at_least(what, bound, dense(keys, heads) / value(data.step(name, keys, heads))))

    for keys, bound, us in ((K64, 8, 320), (K128, 8, 620)):
        faster("misa", keys, bound)
        rows.append(at_most(f"the same, {keys_of(keys)}:", us, value(data.step("misa", keys))))
    faster("misa", K64, 4.5, 32)
    for name, bounds in ((M4096, (5, 7)), ("misa-dagger", (3, 4)), ("hisa", (3, 5))):
        for keys, bound in zip((K64, K128), bounds, strict=True):
            faster(name, keys, bound)
    slowest = max(value(data.step("misa-r", k)) / value(data.step("misa", k)) for k in (K64, K128))
    verdict = "met" if slowest <= 1.1 else "**missed**"
    rows.append(["MISA-R 7 + 1: ≤ 1.1 × MISA's time, 64K and 128K", times(slowest), verdict])
    logits = data.peers(K64)["logits"].value / value(data.step("dsa", K64))
    rows.append(at_least("DSA, 64K: ≥ 1.25 × the peer's logits alone", 1.25, logits))
    least = min(
        value(data.us("gpu-short", indexer="dsa", keys=k))
        / value(data.us("gpu-short", indexer="auto", keys=k))
        for k in (2048, 4096, 8192, 16384)
    )
    rows.append(at_least("`auto`, 2K to 16K: ≥ 0.98 × DSA", 0.98, least))
    rows.append(at_most("selector, 2048 × 64K:", 250, selected("top_k 2048 x 65536, k 2048")))

    decode = [("DSA", "dsa", (22, 34, 92, 300))]
    for label, name, bounds in decode:
        for batch, bound in zip(BATCHES, bounds, strict=True):
            rows.append(
                at_most(f"decode, B = {batch}: {label}", bound, value(data.decode(name, batch)))
            )
    for label, name, bound in (("MISA", "misa", 325), ("HISA", "hisa", 60),
                               ("2-bit sketch, m = 8192", SKETCH, 135),
                               ("2-bit sketch, m = 16,384", SKETCH_LONG, 160),
                               ("4-bit sketch, all heads, m = 4096", SKETCH_4, 240)):  # fmt: skip
        rows.append(at_most(f"decode, B = 64: {label}", bound, value(data.decode(name, 64))))
    for batch in (64, 256):
        ours = value(decode_at("dsa", batch, 8192))
        ratio = ours / data.decode_peers(batch, 8192)["steps_us"][TOP_K]
        verdict = "met" if ratio <= 0.9 else "**missed**"
        what = f"decode, B = {batch}, 8K: DSA ≤ 0.9 × logits with `misa.top_k`"
        rows.append([what, times(ratio), verdict])
    for name, bound in (("dsa", 60), (SKETCH, 40)):
        us = value(decode_at(name, 1, 1 << 20))
        rows.append(at_most(f"decode, B = 1, 1M: {LABELS[name]}", bound, us))
    ratio = min(
        data.decode_peers(b, context, 32)["steps_us"][TOP_K]
        / value(data.decode("dsa", b, context, 32))
        for b, context in HEADS_32
        if b == 1
    )
    what = "decode, 32 heads, B = 1, 4K to 64K: DSA ≥ 1 × logits with `misa.top_k`"
    rows.append(at_least(what, 1, ratio))
    for batch in (16, 64):
        bound = 1.15 * batch * K128 * 132 / 4e12 * 1e6 + 12
        us = value(data.decode("dsa", batch, K128, 32))
        rows.append(at_most(f"decode, 32 heads, B = {batch}: DSA", bound, us))
    four = {n: value(data.us("gpu-decode-next-4", indexer=n, next_n=4)) for n in ("dsa", "misa")}
    rows.append(at_most("decode, four queries a sequence: DSA", 560, four["dsa"]))
    ratio = four["misa"] / value(data.decode("misa", 64))
    verdict = "met" if ratio <= 1.1 else "**missed**"
    rows.append(["decode, four queries a sequence: MISA ≤ 1.1 × one", times(ratio), verdict])
    rows.append(at_most("selection alone, 64 × 128K:", 22, selected("top_k 64 x 131072, k 2048")))

    for label, name, bound in (("2-bit sketch, m = 4 k", SKETCH, 99.5),
                               ("2-bit sketch, m = 8 k", SKETCH_LONG, 99.5),
                               ("4-bit sketch, m = 2 k", SKETCH_4, 99.9)):  # fmt: skip
        least = min(kept_by_sketch(name, top_k)[1] for top_k in SKETCH_TOP_K)
        verdict = "met" if least >= bound else "**missed**"
        what = f"recall in every trace, at every top k: {label} ≥ {bound} %"
        rows.append([what, f"{least:.2f} %", verdict])
    onednn, one = "peer/onednn_matmul_bf16", "cpu-stages-1"
    ratio = data.stage_ms(onednn, one).value / data.stage_ms("score/dense/bf16", one).value
    rows.append(at_least("CPU: dense scores ≥ 0.7 × oneDNN's rate, one thread", 0.7, ratio))
    for name, bound in (("misa", 5), ("misa-r", 5), (M4096, 4)):
        for dtype in ("bf16", "e4m3"):
            ratio = value(data.cpu_ms("dsa", dtype)) / value(data.cpu_ms(name, dtype))
            rows.append(at_least(f"CPU, {dtype}: {LABELS[name]} ≥ {bound} × DSA", bound, ratio))
    return rows


def targets() -> str:
    return table(("target", "reached", ""), target_rows())


def selected(name: str) -> float:
    return next(e["us"] for e in data.record("gpu-select").results if e["name"] == name)


def floors() -> str:
    gpu = data.record("gpu-floors").results
    one, every = data.cpu_floor("gflops_one_thread"), data.cpu_floor("gflops")
    rate, copy = gpu["products_tflops"], gpu["copy_tbps"]
    spread = (gpu["products_tflops_high"] - gpu["products_tflops_low"]) / 2
    product = 2048 * K64 * 256 / rate * 1e-6  # µs of a row of every query
    cycles = {name: gpu[f"{name}_cycles"] for name in ("products", "scores", "gated")}
    rows = [
        ["products of e4m3 alone, at the clock that 700 W leave them",
         f"{rate:,.0f} ± {spread:.0f} TFLOP/s",
         f"64 rows a query at 64K: {64 * product:,.0f} µs; 8 rows {8 * product:.0f}; "
         f"4 rows {4 * product:.0f}"],
        ["the same, 64 keys × 128 rows on an SM", f"{cycles['products']:.0f} cycles", ""],
        ["with weighted ReLU sums", f"{cycles['scores']:.0f} cycles",
         f"{times(cycles['scores'] / cycles['products'])} the products"],
        ["and with the gate, which no score passes", f"{cycles['gated']:.0f} cycles",
         f"{times(cycles['gated'] / cycles['products'])} the products"],
        ["a copy in device memory, bytes read and written", f"{copy:.1f} TB/s",
         f"keys and scales of 64 sequences of 128K: {64 * K128 * KEY_BYTES / copy * 1e-6:.0f} µs"],
        ["CPU: products of bf16 alone, one thread", f"{shown(one)} GFLOP/s", ""],
        ["CPU: the same, all threads", f"{shown(every)} GFLOP/s",
         f"64 rows of 256 queries at 64K: {64 * 256 * K64 * 256 / every.value * 1e-6:,.0f} ms"],
    ]  # fmt: skip
    return table(("bare loop", "rate", "so"), rows)


def sources() -> str:
    rows = []
    for name in sorted({path.stem for path in data.RESULTS.glob("*.json")}):
        found = data.load(name)
        machine = found.machine.get("devices") or (
            f"{found.machine['processor']}, {found.machine['threads']} threads"
        )
        command = found.command.replace("|", "\\|")
        notes = ["transcribed"] * found.transcribed + [found.note] * bool(found.note)
        rows.append([f"`{name}`", machine, found.date[:10], f"`{found.commit[:7]}`",
                     f"`{command}`", "; ".join(notes)])  # fmt: skip
    return table(("result", "machine", "date", "commit", "command", "note"), rows)


# Columns of the tables of stages: what `misa_bench_step --stages` prints under these names.
STAGES = {
    "scales": ("scales",),
    "route, filter": ("route", "filter"),
    "samples, threshold": ("samples", "threshold"),
    "score": ("candidates", "score"),
    "select": ("survivors", "select"),
    "fallback": ("fallback",),
    "re-rank, select": ("rerank", "last"),
}


def stages_of(keys: int) -> str:
    rows = []
    for name in STEPS:
        stages = dict(data.stages(name, keys))
        if "rerank" in stages:  # the selection that ends the step is the re-rank's
            stages["last"] = stages.pop("select")
        cells = [", ".join(f"{stages[n]:.0f}" for n in names if n in stages)
                 for names in STAGES.values()]  # fmt: skip
        rows.append([LABELS[name], number(value(data.step(name, keys))), *cells])
    return table((f"64 heads, L = {keys_of(keys)}", "step", *STAGES), rows)


def decode_verdict() -> str:
    """How DSA stands to DeepGEMM's logits with misa.top_k, over all shapes, without and with the
    schedule of the logits."""
    shapes = [(batch, K128, 64) for batch in BATCHES] + [(64, 8192, 64), (256, 8192, 64)]
    shapes += [(batch, context, 32) for batch, context in HEADS_32]
    ours = [value(data.decode("dsa", *shape)) for shape in shapes]
    peers = [data.decode_peers(*shape) for shape in shapes]
    schedules = [peer["schedule_us"] for peer in peers]
    bare = [us / peer["steps_us"][TOP_K] for us, peer in zip(ours, peers, strict=True)]
    whole = [us / (peer["steps_us"][TOP_K] + peer["schedule_us"])
             for us, peer in zip(ours, peers, strict=True)]  # fmt: skip
    less = sum(ratio > 1 for ratio in bare)
    count = f"all {less}" if less == len(bare) else f"{less} of {len(bare)}"
    return textwrap.fill(
        f"DeepGEMM's logits with this library's selection take less time than its own DSA in "
        f"{count} shapes of this table and the next in which both were measured, where DSA takes "
        f"{times(min(bare))} to {times(max(bare))} their time. That leaves out the schedule of the "
        f"logits, {min(schedules):.1f} to {max(schedules):.1f} µs, which an engine makes once for "
        f"all layers; DSA's thread blocks find their work in every call. Beside logits with a "
        f"schedule in every call DSA takes {times(min(whole))} to {times(max(whole))} the time.",
        110,
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "picture": picture,
    "indexers": indexers,
    "indexers-machines": indexers_machines,
    "commands": commands,
    "recall-time": recall_time,
    "sketch-recall": sketch_recall,
    "summary": summary,
    "decode-plot": decode_plot,
    "decode": decode,
    "decode-verdict": decode_verdict,
    "decode-shapes": decode_shapes,
    "prefill-plot": prefill_plot,
    "prefill-64": lambda: prefill_of(64),
    "prefill-32": lambda: prefill_of(32),
    "contexts-plot": contexts_plot,
    "contexts": contexts,
    "long-contexts": long_contexts,
    "queries": queries,
    "selector": selector,
    "engine": engine,
    "engine-tokens": engine_tokens,
    "engine-line": engine_line,
    "engine-host": engine_host,
    "served-vllm": lambda: served(SERVED_VLLM, "served-vllm-0.26.0", "served-vllm-0.33.0"),
    "served-sglang": lambda: served(SERVED_SGLANG, "served-sglang-0.5.17"),
    "context-parallel": context_parallel,
    "cpu": cpu,
    "cpu-peers": cpu_peers,
    "targets": targets,
    "floors": floors,
    "stages-64": lambda: stages_of(K64),
    "stages-128": lambda: stages_of(K128),
    "sources": sources,
}


def block(name: str) -> str:
    if name not in BLOCKS:
        raise SystemExit(f"report.py: no table {name}: expected one of {', '.join(BLOCKS)}")
    return BLOCKS[name]()
