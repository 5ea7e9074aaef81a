# SPDX-License-Identifier: Apache-2.0
"""What is claimed of the indexers, and what the lab's measurements say of it.

Nothing here is measured: bounds are what the claims say, and everything else is read from the JSON
beside the indexers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import base, sparse
from .indexer import DIM
from .statistics import Interval, difference, interval, share, widened

PAPER = "arXiv 2605.07363"
# What it reports of LongBench: the average of its tasks, times 100.
PAPER_SCORES = {
    "DeepSeek-V3.2": {"dsa": 51.05, "misa:h=8": 50.85, "hisa": 50.78},
    "GLM-5": {"dsa": 46.01, "misa:h=8": 46.43, "hisa": 46.32},
}
EVERY_LAYER = 0.92  # of DSA's tokens its 8 heads recover there
EARLIER = "a first small testbed of this project, one seed"
KINDS = ("quality", "selection", "language", "retrieval")
FLOOR = "dsa:fp8"
SYNTHETIC = ("needle", "needles", "list")  # of lab.retrieval, beside the tasks of LongBench
# Of what the best positions keep more than the last ones, an indexer that closes less than half
# says more of how it was trained than of selections.
WEAK = 0.5
DOCUMENTS = 5  # of fewer nothing is concluded
SAMPLES = 128  # keys from which slopes and dispersions are estimated (docs/spec.md)
POINT = 0.01  # of a score: within it scores count as equal
TENTH = 0.001  # of a point of recall: within it recalls count as equal


class Testbed(NamedTuple):
    """A folder of lab.distill with what was measured in it."""

    name: str
    state: dict[str, Any]
    found: dict[str, list[dict[str, Any]]]
    stale: list[str]  # files of another step than the indexers'

    @property
    def base(self) -> str:
        return self.state.get("base", base.SMOLLM2)

    @property
    def heads(self) -> int:
        return self.state["settings"]["heads"]


def testbed(folder: Path) -> Testbed:
    state = json.loads((folder / "state.json").read_text())
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    stale = []
    for kind in KINDS:
        for path in sorted(folder.glob(f"{kind}-*.json")):
            one = json.loads(path.read_text())
            one = {**one.get("settings", {}), **one}
            if one["step"] == state["step"]:
                found[kind].append(one)
            else:
                stale.append(path.name)
        found[kind].sort(key=lambda one: (one.get("length", 0), one.get("top_k", 0)))
    return Testbed(folder.name, state, found, stale)


def closed(entry: dict[str, Any]) -> float:
    """Of what the best positions keep more than the last ones, the part that an indexer does."""
    room = entry["best"][0] - entry["recent"][0]
    return (entry["indexer"][0] - entry["recent"][0]) / room if room > 0 else 0.0


def is_weak(entry: dict[str, Any]) -> bool:
    """An entry of lab.quality."""
    return closed(entry) < WEAK or entry["over_recent"][1] <= 0


def weakness(testbed: Testbed, length: int, top_k: int) -> str:
    """Why a testbed supports no claim at a context; nothing where it does."""
    step, steps = testbed.state["step"], testbed.state["settings"]["steps"]
    if step < steps:
        return f"its training stopped at {step:,} of {steps:,} steps"
    entries = [
        entry
        for one in testbed.found["quality"]
        for entry in one["means"]
        if (one["length"], entry["top_k"]) == (length, top_k)
    ]
    if not entries:
        return "what its indexers keep of the attention there was not measured"
    (entry,) = entries
    if is_weak(entry):
        part = f"{100 * closed(entry):.0f} %"
        return f"its indexers close {part} of what there is to gain over the last positions"
    return ""


def contexts(testbed: Testbed) -> list[tuple[int, int]]:
    """Every length and k that something was measured at."""
    found = {
        (one["length"], top_k)
        for files in testbed.found.values()
        for one in files
        for top_k in (
            [one["top_k"]] if "top_k" in one else {entry["top_k"] for entry in one["means"]}
        )
    }
    return sorted(found)


def by_label(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["label"]: one for one in results}


class Measured(NamedTuple):
    """one: the file that it is from; where: the context; found: what is compared with the bound,
    widened for few documents; tells: whether what was measured could tell choices apart; below:
    layers in which it is below the bound for certain, whatever the mean over layers."""

    one: dict[str, Any]
    where: str
    found: Interval
    bound: float
    documents: int
    tells: bool = True
    below: tuple[int, ...] = ()

    @property
    def verdict(self) -> str:
        if self.documents < DOCUMENTS or not self.tells:
            return "open"
        if self.below or self.found.high < self.bound:
            return "fails"
        return "holds" if self.found.low >= self.bound else "open"


class Claim(NamedTuple):
    """text: what is claimed; said: by whom, with their figures; unit: what `Measured.found` is
    multiplied by to be shown, and its name."""

    text: str
    said: str
    unit: tuple[float, str]
    measure: Callable[[Testbed], Iterator[Measured]]


PERCENT, POINTS = (100, "%"), (100, "points")


def where(one: dict[str, Any]) -> str:
    return f"{one['length']:,} tokens, k = {one['top_k']:,}"


def worst(result: dict[str, Any]) -> dict[str, Any]:
    """Of a result of lab.selection, the layer of least recall."""
    return min(result["layers"], key=lambda layer: layer["recall"][0])


def _worst_recalls(label: str, bound: float) -> Callable[[Testbed], Iterator[Measured]]:
    def measure(testbed: Testbed) -> Iterator[Measured]:
        for one in testbed.found["selection"]:
            result = by_label(one["results"]).get(label)
            if result is not None:
                least = worst(result)
                count = len(result["layers"])
                place = f"{where(one)}, layer {least['layer']}, the worst of {count}"
                documents = len(set(one["documents"]))
                whole = count == testbed.state["settings"].get("layers", count)
                recall = widened(Interval(*least["recall"]), documents)
                yield Measured(one, place, recall, bound, documents, tells=whole)

    return measure


def recall_over(one: dict[str, Any], label: str, other: str) -> Interval | None:
    """Of a file of lab.selection, the recall of a choice less that of another; the interval is
    widened for few documents."""
    results = by_label(one["results"])
    if label not in results or other not in results:
        return None
    pair = (results[each]["recall_by_window"] for each in (label, other))
    return widened(difference(*pair, one["documents"]), len(set(one["documents"])))


def layers_below(one: dict[str, Any], label: str, other: str, bound: float) -> tuple[int, ...]:
    """Of a file of lab.selection, the layers in which the whole interval of a choice's recall is
    below that of another, by more than the bound allows."""
    results, documents = by_label(one["results"]), len(set(one["documents"]))
    pairs = zip(results[label]["layers"], results[other]["layers"], strict=True)
    return tuple(
        own["layer"]
        for own, of_other in pairs
        if widened(Interval(*own["recall"]), documents).high
        < widened(Interval(*of_other["recall"]), documents).low + bound
    )


def _recalls_over(label: str, other: str, bound: float) -> Callable[[Testbed], Iterator[Measured]]:
    def measure(testbed: Testbed) -> Iterator[Measured]:
        for one in testbed.found["selection"]:
            over = recall_over(one, label, other)
            if over is not None:
                below = layers_below(one, label, other, bound)
                place = where(one)
                if below:
                    place += f", below in the layers {', '.join(map(str, below))}"
                count = len(set(one["documents"]))
                yield Measured(one, place, over, bound, count, below=below)

    return measure


def _scores_over(label: str, other: str, bound: float) -> Callable[[Testbed], Iterator[Measured]]:
    """Of LongBench's prompts; `label` and `other` are without the number of HISA's blocks."""

    def measure(testbed: Testbed) -> Iterator[Measured]:
        for one in testbed.found["language"]:
            scores: dict[str, dict[str, float]] = {}
            for prompt, answers in one["answers"].items():
                for each, said in answers.items():
                    scores.setdefault(each.split(":blocks")[0], {})[prompt] = said["score"]
            over, prompts = _paired(scores, label, other)
            if over is not None:
                ground, _ = _paired(scores, "dsa", sparse.RECENCY)
                tells = ground is not None and ground.low > 0
                place = f"{where(one)}, {prompts} prompts"
                yield Measured(one, place, over, bound, prompts, tells)

    return measure


def _paired(
    scores: dict[str, dict[str, float]], label: str, other: str
) -> tuple[Interval | None, int]:
    """The difference over the prompts that both answered, and how many these are."""
    own, others = scores.get(label, {}), scores.get(other, {})
    both = sorted(own.keys() & others.keys())
    if not both:
        return None, 0
    over = difference([own[x] for x in both], [others[x] for x in both])
    return widened(over, len(both)), len(both)


def _answers(label: str, bound: float) -> Callable[[Testbed], Iterator[Measured]]:
    """Of the questions of lab.retrieval that DSA answers, the share that a choice does. Where keys
    rounded to e4m3 alone lose as many answers, nothing can be told."""

    def measure(testbed: Testbed) -> Iterator[Measured]:
        for one in testbed.found["retrieval"]:
            for kind in SYNTHETIC:
                answered = _answered(one, kind, label)
                if answered:
                    found, documents = _share_of_answers(answered)
                    floor = _answered(one, kind, FLOOR)
                    tells = not floor or _share_of_answers(floor)[0].mean >= bound
                    place = f"{where(one)}, {kind}, {len(answered)} questions"
                    yield Measured(one, place, found, bound, documents, tells)

    return measure


def _answered(one: dict[str, Any], kind: str, label: str) -> list[tuple[str, bool]]:
    """Of a file of lab.retrieval, for each question of a kind that DSA answers its document, and
    whether a choice answers it."""
    return [
        (case["document"], bool(question["answers"][label][0]))
        for case in one["cases"].values()
        if case["kind"] == kind
        for question in case["questions"]
        if label in question["answers"] and question["answers"].get("dsa", [0])[0]
    ]


def _share_of_answers(answered: list[tuple[str, bool]]) -> tuple[Interval, int]:
    """The share of right answers, and of how many documents they are. Its interval holds Wilson's,
    for the number of questions, and the bootstrap's, as questions to one document are alike."""
    documents = [document for document, _ in answered]
    right, count = [float(hit) for _, hit in answered], len(set(documents))
    wilson, drawn = share(int(sum(right)), len(right)), widened(interval(right, documents), count)
    found = Interval(drawn.mean, min(wilson.low, drawn.low), max(wilson.high, drawn.high))
    return found, count


def _said(label: str, other: str) -> str:
    models = (f"{of[label]} against {of[other]} ({model})" for model, of in PAPER_SCORES.items())
    return f"LongBench: {', '.join(models)}"


CLAIMS = [
    Claim(
        "8 routed heads keep more than 92 % of DSA's tokens in every layer",
        PAPER,
        PERCENT,
        _worst_recalls("misa:h=8", EVERY_LAYER),
    ),
    Claim(
        "needles are found at every length: with 8 routed heads 95 % or more of what DSA answers",
        f"{PAPER}, where needles are found everywhere to 128K",
        PERCENT,
        _answers("misa:h=8", 0.95),
    ),
    Claim(
        "tasks do not suffer: MISA with 8 heads scores no point less than DSA",
        f"{PAPER}, {_said('misa:h=8', 'dsa')}",
        POINTS,
        _scores_over("misa:h=8", "dsa", -POINT),
    ),
    Claim(
        "MISA with 8 heads scores no less than HISA",
        f"{PAPER}, {_said('misa:h=8', 'hisa')}",
        POINTS,
        _scores_over("misa:h=8", "hisa", 0),
    ),
    Claim(
        "re-ranking 4 k candidates recovers what rounding keys to e4m3 keeps",
        f"{PAPER}, where re-ranking recovers almost everything",
        POINTS,
        _recalls_over("misa-dagger:h=8:m=4k", FLOOR, -TENTH),
    ),
    Claim(
        "3 heads and a linear row keep no less than 8 routed heads",
        EARLIER,
        POINTS,
        _recalls_over("misa-r:h=3", "misa:h=8", 0),
    ),
    Claim(
        "3 heads and a linear row, 4 k candidates re-ranked, keep what rounding keys to e4m3 keeps",
        EARLIER,
        POINTS,
        _recalls_over("misa-r:h=3:m=4k", FLOOR, -TENTH),
    ),
    Claim(
        "7 heads and a linear row answer 95 % or more of what DSA answers",
        EARLIER,
        PERCENT,
        _answers("misa-r:h=7", 0.95),
    ),
    Claim(
        "3 heads and a linear row, 4 k candidates re-ranked, answer 95 % or more of what DSA does",
        EARLIER,
        PERCENT,
        _answers("misa-r:h=3:m=4k", 0.95),
    ),
    Claim(
        "a sketch of 2 bits, 8 k candidates re-ranked, loses no more than 0.1 points to DSA on the "
        "same keys",
        EARLIER,
        POINTS,
        _recalls_over("misa-r:h=3:m=8k:sketch=2:fp8", FLOOR, -TENTH),
    ),
]


def products(chosen: sparse.Choice, heads: int, length: int) -> float:
    """Products of a query head and a key, or a mean of keys, as a share of DSA's, for all rows of a
    prefill of `length` tokens."""
    config = chosen.config
    if config is None:
        return 0.0
    seen = np.arange(1, length + 1)
    rows = heads if config.router == "all" else config.heads + config.residual
    scanned, beside = seen, 0 * seen
    if config.filter_block:
        scanned = np.minimum(seen, config.filter_blocks * config.filter_block)
        beside = seen // config.filter_block
    if config.router == "pooled":
        beside = beside + seen // config.block
    elif config.router in ("nonlinearity", "dispersion"):
        beside = beside + np.minimum(seen, SAMPLES)
    if config.candidates:
        beside = beside + np.minimum(seen, config.candidates)
    return float((rows * scanned + heads * beside).sum() / (heads * seen.sum()))


def key_bytes(chosen: sparse.Choice, length: int) -> float:
    """Bytes of keys and what stands for them that a decode step reads, as a share of those of DSA
    on e4m3 keys. A choice that was not measured on e4m3 keys reads bf16."""
    config = chosen.config
    if config is None:
        return 0.0
    whole = DIM + 4 if chosen.fp8 else 2 * DIM
    read = whole * length
    if config.sketch:
        scales = 2 if config.sketch == 2 else DIM // 32
        read = (config.sketch * DIM // 8 + scales) * length + whole * config.candidates
    if config.filter_block:
        kept = min(length, config.filter_blocks * config.filter_block)
        read = whole * kept + 4 * DIM * (length // config.filter_block)
    return read / ((DIM + 4) * length)


class Default(NamedTuple):
    """The cheapest choice that keeps what the noise floor keeps, at one shape and length."""

    heads: int
    length: int
    top_k: int
    testbeds: list[str]
    documents: int
    products: str | None
    bytes: str | None
    auto: str  # what `auto` is there
    auto_keeps: bool | None  # None: not measured


def auto(heads: int, length: int, top_k: int) -> str:
    """What the indexer `auto` is for a query that sees all of a context."""
    config = sparse.choice("auto", top_k).config
    if config.dense_work and heads * length <= config.dense_work:
        return "dsa"
    return f"misa-r:h={config.heads}:m={config.candidates // top_k}k"


def keeps(one: dict[str, Any], language: list[dict[str, Any]], label: str) -> bool:
    """Whether a choice keeps what rounding keys to e4m3 keeps: DSA's set, and where it was
    measured the next token's distribution; in the mean over layers, and for all that can be told in
    each layer."""
    if label == "dsa":
        return True
    over = recall_over(one, label, FLOOR)
    if over is None or over.low < -TENTH or layers_below(one, label, FLOOR, -TENTH):
        return False
    for other in language:
        text = by_label(other["text"])
        if label in text and FLOOR in text and text[label]["kl"][0] > text[FLOOR]["kl"][2]:
            return False
    return True


def defaults(testbeds: list[Testbed]) -> list[Default]:
    """One for every number of heads, length and k that testbeds which are not weak were measured
    at; a choice has to pass on all of them."""
    groups: dict[tuple[int, int, int], list[tuple[Testbed, dict[str, Any]]]] = {}
    for each in testbeds:
        for one in each.found["selection"]:
            at = one["length"], one["top_k"]
            if len(set(one["documents"])) >= DOCUMENTS and not weakness(each, *at):
                groups.setdefault((each.heads, *at), []).append((each, one))
    result = []
    for (heads, length, top_k), members in sorted(groups.items()):

        def passes(label: str, members: Any = members, at: Any = (length, top_k)) -> bool:
            return all(
                keeps(
                    one,
                    [x for x in each.found["language"] if (x["length"], x["top_k"]) == at],
                    label,
                )
                for each, one in members
            )

        measured = set.intersection(*(set(by_label(one["results"])) for _, one in members))
        labels = [label for label in ("dsa", *sorted(measured)) if passes(label)]
        choices = [sparse.choice(label, top_k) for label in labels]
        least = min(choices, key=lambda x: (products(x, heads, length), x.label))
        fewest = min(choices, key=lambda x: (key_bytes(x, length), products(x, heads, length)))
        now = auto(heads, length, top_k)
        result.append(
            Default(
                heads,
                length,
                top_k,
                [each.name for each, _ in members],
                min(len(set(one["documents"])) for _, one in members),
                least.label,
                fewest.label,
                now,
                passes(now) if now == "dsa" or now in measured else None,
            )
        )
    return result
