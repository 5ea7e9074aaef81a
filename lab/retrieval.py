# SPDX-License-Identifier: Apache-2.0
"""Whether what is asked for is selected, and whether it is answered.

    python -m lab.retrieval FOLDER --text FILE... [--base DECODER] [--length 16384] [--top-k 512]
        [--prompts minilongbench.jsonl.xz] [--minutes 8]

Facts of known positions in held-out text, asked for at its end: a needle by itself at each depth
(`needle`), needles at every depth among as many that nobody asks for (`needles`), lines of a list
as long as the context (`list`), and prompts of LongBench whose answers stand in them.

Selection: with dense attention in every layer, in how many of the questions an indexer's set holds
the position of the value, by the row that says its first token, and what part of the fact; beside
them the dense attention that the row gives the fact. Answers: with every layer attending only to
what its indexer selects, how many are exact, and their log-probability. Each by label, depth and
layer, with 95 % intervals by bootstrap over documents, of which every prompt is one; of shares of
questions that are each of another document by Wilson. A question's layers, or those that look at
the fact, are first averaged: they are not independent.

FOLDER/retrieval-LENGTH-K.json is written after each pass; a run stops after --minutes, and goes on
when it is started again.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import base, gold, longbench, sparse, tasks
from .indexer import replace
from .language import DENSE, DSA, compared
from .passes import begun, work
from .statistics import Interval, interval, share
from .trained import Sample, Trained, parser_of, trained

LINES = 8  # of a list that are asked for
# Of a row's attention, averaged over heads, on a fact: the layer looks at it.
LOOKS = 0.1


class Asked(NamedTuple):
    """row: the position that says the answer's first token. places: any of them has the value.
    facts: what tells it. depth: of the first place in the context, 0 to 1."""

    row: int
    places: list[int]
    facts: list[tuple[int, int]]
    depth: float


class Case(NamedTuple):
    """A context of a document and its questions, in the order of example.questions."""

    name: str
    kind: str
    document: str
    example: tasks.Example
    asked: list[Asked]


def case(name: str, kind: str, document: str, example: tasks.Example) -> Case:
    asked = [
        Asked(one.answer[0] - 1, [one.value[0]], [one.fact], one.value[0] / len(example.ids))
        for one in example.questions
    ]
    return Case(name, kind, document, example, asked)


def synthetic(maker: tasks.Maker, sample: Sample, length: int, depths: int) -> Iterable[Case]:
    """Of each held-out window a context of each kind, and a needle by itself at each depth."""
    middles = [(i + 0.5) / depths for i in range(depths)]
    for number, (window, document) in enumerate(zip(*sample, strict=True)):
        haystack = window.numpy()
        made = {
            f"needle-{i}": tasks.needles(maker, haystack, length, [depth], _choice(number, i))
            for i, depth in enumerate(middles)
        }
        choice = _choice(number, -1)
        order = choice.sample(middles, depths)
        made["needles"] = tasks.needles(maker, haystack, length, order, choice, others=depths)
        made["list"] = tasks.listed(maker, haystack, length, LINES, choice)
        for name, example in made.items():
            yield case(f"{name}/{number}", name.split("-")[0], f"text {document}", example)


def _choice(number: int, i: int) -> random.Random:
    return random.Random(f"retrieval {number} {i}")


def of_prompts(
    prompts: list[longbench.Prompt], tokenizer: Any, length: int, top_k: int
) -> list[Case]:
    """Those whose answers stand in them, that are no longer than `length`, and of which not
    everything is selected: more than top_k tokens are before the answer."""
    cases = []
    for prompt in prompts:
        found = gold.found(prompt, tokenizer) if prompt.task in gold.TASKS else None
        if found is None or len(found.ids) > length or found.answer[0] <= top_k:
            continue
        question = tasks.Question(found.facts[0], found.answer, found.answer)
        example = tasks.Example(found.ids, found.ids * 0, [question])
        depth = found.places[0] / len(found.ids)
        asked = [Asked(found.answer[0] - 1, found.places, found.facts, depth)]
        cases.append(Case(prompt.name, prompt.task, prompt.name, example, asked))
    return cases


@torch.no_grad()
def dense(
    model: Any, indexers: Any, one: Case, choices: list[sparse.Choice]
) -> tuple[list[tasks.Answered], list[list[float]], dict[str, list[list[list[float]]]]]:
    """Of a pass with dense attention: the answers; for each question and layer the attention on the
    facts; and for each label, question and layer whether the set holds a place (1 or 0) and the
    part of the facts that it holds."""
    device = next(model.parameters()).device
    rows = torch.tensor([asked.row for asked in one.asked], device=device)
    attention: list[list[float]] = [[] for _ in one.asked]
    selected: dict[str, list[list[list[float]]]] = {
        chosen.label: [[] for _ in one.asked] for chosen in choices
    }
    length = len(one.example.ids)
    facts = torch.zeros(len(rows), length, device=device)
    for number, asked in enumerate(one.asked):
        for first, end in asked.facts:
            facts[number, first:end] = 1

    def see(i: int, module: Any, hidden: Any, cos: Any, sin: Any) -> None:
        seen = (base.attention(module, hidden, cos, sin, rows) * facts).sum(1)
        inputs = (*indexers[i](hidden.float(), cos.float(), sin.float(), rows), rows)
        for number, value in enumerate(seen.tolist()):
            attention[number].append(value)
        for chosen in choices:
            got = sparse.positions(chosen, *inputs, seed=i)
            marked = torch.zeros(len(rows), length + 1, device=device)
            marked.scatter_(1, got.where(got >= 0, length), 1)
            marked = marked[:, :length]
            parts = ((marked * facts).sum(1) / facts.sum(1)).tolist()
            for number, asked in enumerate(one.asked):
                found = float(marked[number, asked.places].max())
                selected[chosen.label][number].append([found, parts[number]])

    with base.watched(model, see):
        answers = tasks.answered(model, one.example)
    return answers, attention, selected


def summary(cases: list[dict[str, Any]], labels: list[str], depths: int) -> list[dict[str, Any]]:
    """Of cases as `measure` keeps them, for each kind and label: `answers` and `selection`, both
    also by depth, the second one also by layer."""
    results = []
    for kind in dict.fromkeys(one["kind"] for one in cases):
        for label in labels:
            own = [one for one in cases if one["kind"] == kind]
            entry: dict[str, Any] = {"kind": kind, "label": label}
            said = [
                (number, one["document"], question["depth"], *question["answers"][label])
                for number, one in enumerate(own)
                for question in one["questions"]
                if label in question["answers"]
            ]
            chosen = [
                (one["document"], question["depth"])
                + (question["selected"][label], question["attention"])
                for one in own
                for question in one["questions"]
                if label in question["selected"]
            ]
            if said:
                numbers, documents, places, exact, logs = map(list, zip(*said, strict=True))
                entry["answers"] = {
                    "contexts": len(set(numbers)),
                    "documents": len(set(documents)),
                    "questions": len(said),
                    "exact": _share(exact, documents),
                    "log_probability": interval(logs, documents),
                    "by_depth": _by_depth(places, exact, documents, depths, _share),
                }
            if chosen:
                entry["selection"] = _selection(chosen, depths)
            if said or chosen:
                results.append(entry)
    return results


def _selection(chosen: list[tuple[str, float, Any, list[float]]], depths: int) -> dict[str, Any]:
    documents, places, held, attention = map(list, zip(*chosen, strict=True))
    layers = range(len(held[0]))
    # Of each question, whether it was found in each layer that looks.
    looked = [
        [pair[0] for pair, seen in zip(*both, strict=True) if seen >= LOOKS]
        for both in zip(held, attention, strict=True)
    ]
    where = [number for number, one in enumerate(looked) if one]
    means = [[_mean(pair[part] for pair in one) for one in held] for part in (0, 1)]
    return {
        "questions": len(chosen),
        "documents": len(set(documents)),
        "found": interval(means[0], documents),
        "found_where_looked": interval(
            [_mean(looked[number]) for number in where], [documents[number] for number in where]
        )
        if where
        else None,
        "looked": sum(map(len, looked)),
        "of_facts": interval(means[1], documents),
        "by_layer": [
            {
                "layer": i,
                "found": _share([one[i][0] for one in held], documents),
                "of_facts": _mean(one[i][1] for one in held),
                "attention": _mean(seen[i] for seen in attention),
            }
            for i in layers
        ],
        "by_depth": _by_depth(places, means[0], documents, depths, interval),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _share(values: list[float], documents: list[str]) -> Interval:
    """Of questions' hits, which are independent if no two are of a document."""
    if len(set(documents)) == len(documents):
        return share(int(sum(values)), len(values))
    return interval(values, documents)


def _by_depth(
    places: list[float], values: list[float], documents: list[str], depths: int, of: Any
) -> list[dict[str, Any]]:
    """Of questions about places at depths from 0 to 1, their share as `of` finds it."""
    found: dict[int, list[tuple[float, str]]] = {}
    for place, *one in zip(places, values, documents, strict=True):
        found.setdefault(min(int(place * depths), depths - 1), []).append(tuple(one))
    return [
        {
            "depth": (i + 0.5) / depths,
            "count": len(ones),
            "share": of(*map(list, zip(*ones, strict=True))),
        }
        for i, ones in sorted(found.items())
    ]


def measure(
    model: Any,
    indexers: Any,
    cases: Iterable[Case],
    labels: list[str],
    path: Path,
    settings: dict[str, Any],
    *,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What there is in `path`, and what is lacking there, case by case, until `seconds` are over.
    settings: `top_k` and `depths`, and what else the file must have in common with this call.
    Raises ValueError if it has not.
    """
    state = begun(path, settings)
    kept = state.setdefault("cases", {})
    choices = {label: sparse.choice(label, settings["top_k"]) for label in labels}

    def look(one: Case, lacking: list[str]) -> None:
        found = dense(model, indexers, one, [choices[label] for label in lacking])
        for number, question in enumerate(kept[one.name]["questions"]):
            question["answers"][DENSE] = list(found[0][number])
            question["attention"] = found[1][number]
            question["selected"] |= {label: found[2][label][number] for label in lacking}

    def answer(one: Case, label: str) -> None:
        with sparse.attending(model, indexers, choices[label]):
            answers = tasks.answered(model, one.example)
        for question, said in zip(kept[one.name]["questions"], answers, strict=True):
            question["answers"][label] = list(said)

    looks, answers = [], []
    for one in cases:
        questions = kept.setdefault(
            one.name,
            {
                "kind": one.kind,
                "document": one.document,
                "tokens": len(one.example.ids),
                "questions": [
                    {"depth": asked.depth, "answers": {}, "selected": {}} for asked in one.asked
                ],
            },
        )["questions"]
        lacking = [label for label in labels if label not in questions[0]["selected"]]
        if lacking:
            looks.append(partial(look, one, lacking))
        answers += [
            partial(answer, one, label) for label in labels if label not in questions[0]["answers"]
        ]
    jobs = looks + answers

    def keep() -> None:
        replace(path, lambda beside: beside.write_text(json.dumps(state)))

    work(jobs, keep, "passes", seconds, say)
    done = [one for one in kept.values() if one["questions"][0]["answers"]]
    state["results"] = summary(done, [DENSE, *labels], settings["depths"])
    keep()
    return state


def table(results: list[dict[str, Any]]) -> str:
    names = f"{'exact':>8} {'95 %':>15} {'log p':>8} {'found':>8} {'looked at':>10}"
    lines = [f"{'':<51} {names}"]
    for one in results:
        line = f"{one['kind']:<20} {one['label']:<30} "
        if "answers" in one:
            mean, low, high = (100 * x for x in one["answers"]["exact"])
            line += f"{mean:>6.1f} % {low:>6.1f} to {high:>5.1f} "
            line += f"{one['answers']['log_probability'][0]:>8.2f} "
        else:
            line += f"{'':>33} "
        if "selection" in one:
            line += f"{100 * one['selection']['found'][0]:>6.1f} % "
            looked = one["selection"]["found_where_looked"]
            line += f"{100 * looked[0]:>8.1f} %" if looked else f"{'-':>10}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = parser_of("lab.retrieval", __doc__, length=8192)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--indexers", nargs="+", help="beside dense and dsa; some if not given")
    parser.add_argument(
        "--contexts", type=int, default=12, help="of each kind, and of needles at each depth"
    )
    parser.add_argument("--depths", type=int, default=8)
    parser.add_argument("--prompts", type=Path, help=".jsonl of LongBench, also .xz")
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = parser.parse_args()
    start = time.monotonic()
    if options.top_k >= options.length:
        parser.error(f"--top-k: expected less than --length, got {options.top_k}")
    labels = list(dict.fromkeys([DSA, *(options.indexers or compared(options.top_k))]))
    try:
        for label in labels:
            sparse.choice(label, options.top_k)
    except ValueError as error:
        parser.error(f"--indexers: {error}")
    given = trained(parser, options, seed=4)
    prompts = longbench.prompts(options.prompts) if options.prompts else []
    cases = list(asked(given, prompts, options))
    settings = {name: getattr(options, name) for name in ("length", "top_k", "depths")}
    settings |= {"text": given.text, "prompts": longbench.digest(prompts)}
    path = options.folder / f"retrieval-{options.length}-{options.top_k}.json"
    state = measure(
        given.model,
        given.indexers,
        cases,
        labels,
        path,
        {"step": given.step, "heads": given.shape.heads, **settings},
        seconds=options.minutes * 60 - (time.monotonic() - start),
    )
    print(table(state["results"]))
    return 0


def asked(given: Trained, prompts: list[longbench.Prompt], options: Any) -> Iterable[Case]:
    maker = tasks.Maker(given.base.tokenizer)
    yield from synthetic(maker, given.sample(options.contexts), options.length, options.depths)
    yield from of_prompts(prompts, given.base.tokenizer, options.length, options.top_k)


if __name__ == "__main__":
    sys.exit(main())
