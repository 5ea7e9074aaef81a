# SPDX-License-Identifier: Apache-2.0
"""What a model says where every layer attends only to what its indexer selects.

    python -m lab.language FOLDER --text FILE... [--prompts minilongbench.jsonl.xz] [--minutes 8]

Dense attention, DSA, and other selections in DSA's place. On windows of held-out text: the loss,
the divergence KL(DSA || other) of the next token, and how often the likeliest token is the same, at
positions that see more than k keys. On prompts of LongBench: its scores. Intervals are by bootstrap
over documents, of which every prompt is one. The noise floor is DSA on keys rounded to e4m3
(dsa:fp8). FOLDER/language-LENGTH-K.json is written after each pass and answer; a run stops after
--minutes, and goes on when it is started again.
"""

from __future__ import annotations

import json
import math
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from misa.integrations._evaluate_measures import compare_logits

from . import longbench, sparse
from .indexer import replace
from .passes import begun, work
from .statistics import difference, interval
from .trained import Sample, parser_of, trained

DENSE, DSA = "dense", "dsa"
ROWS = 512  # positions whose logits are in memory at once


def compared(top_k: int) -> list[str]:
    """What is compared if nothing is asked for, beside DENSE and DSA."""
    return [
        "dsa:fp8",
        "misa:h=8",
        "misa-dagger:h=8:m=4k",
        f"hisa:blocks={max(2, top_k // 32)}",
        "misa-r:h=7",
        "misa-r:h=3:m=4k",
        "misa-r:h=3:m=8k:sketch=2:fp8",
        sparse.RECENCY,
    ]


def choice(label: str, top_k: int) -> sparse.Choice | None:
    return None if label == DENSE else sparse.choice(label, top_k)


@torch.no_grad()
def hidden(
    model: Any, indexers: Any, chosen: sparse.Choice | None, ids: torch.Tensor
) -> torch.Tensor:
    """What the head is given, [L, width]."""
    with sparse.attending(model, indexers, chosen):
        return model.model(ids[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def compare(
    model: Any, dsa: torch.Tensor, other: torch.Tensor, ids: torch.Tensor, top_k: int
) -> dict[str, float]:
    """Of one window, what `hidden` returned for DSA and another: loss, kl and top1, means over the
    positions that see more than top_k keys and have a next token."""
    sums: dict[str, float] = {"loss": 0, "kl": 0, "top1": 0}
    head = model.lm_head.weight.float()  # rounded to bfloat16 logits would differ by themselves
    last = len(ids) - 1
    for first in range(top_k, last, ROWS):
        block = slice(first, min(first + ROWS, last))
        logits = (x[block].float() @ head.T for x in (dsa, other))
        found = compare_logits(*logits, ids[block.start + 1 : block.stop + 1])
        for name in sums:
            sums[name] += float(found[name].sum())
    return {name: total / (last - top_k) for name, total in sums.items()}


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    indexers: Any,
    chosen: sparse.Choice | None,
    prompt: longbench.Prompt,
    length: int,
) -> str:
    """Of the likeliest tokens."""
    ids = longbench.tokens(prompt, tokenizer, length).to(next(model.parameters()).device)
    with sparse.attending(model, indexers, chosen):
        made = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            max_new_tokens=longbench.TASKS[prompt.task].tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def on_windows(windows: list[dict[str, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """The figures of every label, from windows as `measure` keeps them."""
    results = []
    for label in labels:
        done = [window for window in windows if label in window["passes"]]
        if not done:
            continue
        documents = [window["document"] for window in done]
        own, dsa = ([window["passes"][x] for window in done] for x in (label, DSA))
        of = {name: [one[name] for one in own] for name in ("loss", "kl", "top1")}
        results.append(
            {
                "label": label,
                "windows": len(done),
                "documents": len(set(documents)),
                **{name: interval(values, documents) for name, values in of.items()},
                "loss_over_dsa": difference(of["loss"], [one["loss"] for one in dsa], documents),
            }
        )
    return results


def on_prompts(prompts: dict[str, dict[str, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """The scores of every label, from prompts as `measure` keeps them."""
    results = []
    for label in labels:
        done = [(name.split("/")[0], one) for name, one in prompts.items() if label in one]
        if not done:
            continue
        of_tasks: dict[str, list[float]] = {}
        for task, one in done:
            of_tasks.setdefault(task, []).append(one[label]["score"])
        scores, dsa = ([one[x]["score"] for _, one in done] for x in (label, DSA))
        results.append(
            {
                "label": label,
                "prompts": len(done),
                "score": interval(scores),
                "score_over_dsa": difference(scores, dsa),
                "tasks": {
                    task: {"prompts": len(found), "score": sum(found) / len(found)}
                    for task, found in of_tasks.items()
                },
            }
        )
    return results


def measure(
    model: Any,
    tokenizer: Any,
    indexers: Any,
    sample: Sample,
    prompts: list[longbench.Prompt],
    labels: list[str],
    path: Path,
    settings: dict[str, Any],
    *,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """What there is in `path`, and what is lacking there, window by window and prompt by prompt,
    until `seconds` are over. settings: `length` and `top_k`, and what else the file must have in
    common with this call. Raises ValueError if it has not.
    """
    length, top_k = settings["length"], settings["top_k"]
    device = next(model.parameters()).device
    state = begun(path, settings)
    windows, answers = state.setdefault("windows", {}), state.setdefault("answers", {})
    labels = list(dict.fromkeys([DSA, DENSE, *labels]))
    choices = {label: choice(label, top_k) for label in labels}
    dsa: dict[str, torch.Tensor] = {}  # of the window at hand

    def window(name: str, ids: torch.Tensor, label: str) -> None:
        ids = ids.to(device)
        if name not in dsa:
            dsa.clear()
            dsa[name] = hidden(model, indexers, choices[DSA], ids)
        other = dsa[name] if label == DSA else hidden(model, indexers, choices[label], ids)
        windows[name]["passes"][label] = compare(model, dsa[name], other, ids, top_k)

    def ask(prompt: longbench.Prompt, label: str) -> None:
        said = answer(model, tokenizer, indexers, choices[label], prompt, length)
        score = longbench.score(prompt, said)
        answers[prompt.name][label] = {"score": score, "answer": said}

    jobs: list[Callable[[], None]] = []
    for ids, document in zip(sample.windows, sample.documents, strict=True):
        name = f"{zlib.crc32(ids.numpy().tobytes()):08x}"
        passes = windows.setdefault(name, {"document": document, "passes": {}})["passes"]
        jobs += [partial(window, name, ids, label) for label in labels if label not in passes]
    for prompt in prompts:
        given = answers.setdefault(prompt.name, {})
        jobs += [partial(ask, prompt, label) for label in labels if label not in given]

    def keep() -> None:
        replace(path, lambda beside: beside.write_text(json.dumps(state, indent=1)))

    work(jobs, keep, "passes and answers", seconds, say)
    state["text"] = on_windows(list(windows.values()), labels)
    state["prompts"] = on_prompts(answers, labels)
    keep()
    return state


def table(state: dict[str, Any]) -> str:
    lines = [f"{'':<32} {'loss':>7} {'less DSA':>9} {'95 %':>19} {'KL':>8} {'top 1':>8}"]
    for one in state["text"]:
        mean, low, high = one["loss_over_dsa"]
        lines.append(
            f"{one['label']:<32} {one['loss'][0]:>7.4f} {mean:>+9.4f} {low:>+8.4f} to "
            f"{high:>+7.4f} {one['kl'][0]:>8.5f} {100 * one['top1'][0]:>6.2f} %"
        )
    if state["prompts"]:
        lines.append(f"{'':<32} {'score':>7} {'less DSA':>9} {'95 %':>19}")
    for one in state["prompts"]:
        mean, low, high = (100 * x for x in one["score_over_dsa"])
        lines.append(
            f"{one['label']:<32} {100 * one['score'][0]:>7.2f} {mean:>+9.2f} {low:>+8.2f} to "
            f"{high:>+7.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = parser_of("lab.language", __doc__, length=8192)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--indexers", nargs="+", help="beside dense and dsa; some if not given")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--prompts", type=Path, help=".jsonl of LongBench, also .xz")
    parser.add_argument("--tasks", nargs="+", choices=longbench.TASKS, help="all if not given")
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = parser.parse_args()
    start = time.monotonic()
    top_k = options.top_k
    if top_k >= options.length - 1:
        parser.error(f"--top-k: expected less than --length, got {top_k}")
    prompts = longbench.prompts(options.prompts) if options.prompts else []
    asked = longbench.digest(prompts)  # of all tasks: a run may go on with others
    prompts = [one for one in prompts if one.task in (options.tasks or longbench.TASKS)]
    labels = options.indexers or compared(top_k)
    try:
        for label in labels:
            sparse.choice(label, top_k)
    except ValueError as error:
        parser.error(f"--indexers: {error}")
    given = trained(parser, options, seed=3)
    try:
        for one in {one.task: one for one in prompts}.values():
            longbench.tokens(one, given.base.tokenizer, options.length)
    except ValueError as error:
        parser.error(str(error))
    settings = {"step": given.step, "heads": given.shape.heads, "length": options.length}
    settings |= {"top_k": top_k, "text": given.text, "prompts": asked}
    state = measure(
        given.model,
        given.base.tokenizer,
        given.indexers,
        given.sample(options.windows),
        prompts,
        labels,
        options.folder / f"language-{options.length}-{top_k}.json",
        settings,
        seconds=options.minutes * 60 - (time.monotonic() - start),
    )
    print(table(state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
