# SPDX-License-Identifier: Apache-2.0
"""Prompts of LongBench and its scores.

The tasks in English and of code, with LongBench's metrics, lengths of answers and treatment of
them (arXiv 2308.14508). Those in Chinese are left out: the lab's models do not read it.
"""

from __future__ import annotations

import json
import lzma
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Prompt(NamedTuple):
    """gold: any of these answers is right; classes: where the answer is one of some."""

    task: str
    number: str
    text: str
    gold: list[str]
    classes: list[str]

    @property
    def name(self) -> str:
        return f"{self.task}/{self.number}"


def words(text: str) -> list[str]:
    """In lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def f1(answer: str, gold: str, classes: Sequence[str]) -> float:
    """Of the words of an answer."""
    found, wanted = words(answer), words(gold)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def rouge_l(answer: str, gold: str, classes: Sequence[str]) -> float:
    """The F score of ROUGE-L, by the package rouge, which LongBench uses."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"]).get_scores(answer, gold)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):  # no words, or a sentence of very many
        return 0.0


def classified(answer: str, gold: str, classes: Sequence[str]) -> float:
    """1 for naming the class; shared with other classes that are named, but for those whose name
    is a part of its."""
    named = [c for c in classes if c in answer and (c == gold or c not in gold)]
    return 1 / len(named) if gold in named else 0.0


def counted(answer: str, gold: str, classes: Sequence[str]) -> float:
    """The share of the numbers in an answer that are the gold's."""
    (wanted,) = re.findall(r"\d+", gold)
    numbers = re.findall(r"\d+", answer)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def alike(answer: str, gold: str, classes: Sequence[str]) -> float:
    """How alike the first line of code in an answer is."""
    lines = answer.lstrip("\n").split("\n")
    code = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    return round(100 * SequenceMatcher(None, code, gold).ratio()) / 100


class Task(NamedTuple):
    """tokens: of an answer at most. plain: whether the prompt ends with a beginning that the answer
    goes on from, so that it is no message to a chat model. line: whether the first line counts."""

    metric: Callable[[str, str, Sequence[str]], float]
    tokens: int
    plain: bool = False
    line: bool = False


TASKS = {
    "narrativeqa": Task(f1, 128),
    "qasper": Task(f1, 128),
    "multifieldqa_en": Task(f1, 64),
    "hotpotqa": Task(f1, 32),
    "2wikimqa": Task(f1, 32),
    "musique": Task(f1, 32),
    "gov_report": Task(rouge_l, 512),
    "qmsum": Task(rouge_l, 512),
    "multi_news": Task(rouge_l, 512),
    "trec": Task(classified, 64, plain=True, line=True),
    "triviaqa": Task(f1, 32, plain=True, line=True),
    "samsum": Task(rouge_l, 128, plain=True, line=True),
    "passage_count": Task(counted, 32),
    "passage_retrieval_en": Task(counted, 32),
    "lcc": Task(alike, 64, plain=True),
    "repobench-p": Task(alike, 64, plain=True),
}


def prompts(path: Path) -> list[Prompt]:
    """Those of TASKS in a .jsonl file, also compressed by xz, whose lines have the fields task, id,
    prompt and gold; gold is a list of answers, or has them as `answers` beside `all_classes`. In
    turn, one of each task."""
    found: dict[str, list[Prompt]] = {}
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for entry in map(json.loads, file):
            if entry["task"] not in TASKS:
                continue
            gold, classes = entry["gold"], []
            if isinstance(gold, dict):
                gold, classes = gold["answers"], gold["all_classes"]
            prompt = Prompt(entry["task"], str(entry["id"]), entry["prompt"], gold, classes)
            found.setdefault(prompt.task, []).append(prompt)
    if not found:
        raise ValueError(f"{path}: expected prompts of {', '.join(TASKS)}, got none")
    turns = zip_longest(*found.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def digest(prompts: Sequence[Prompt]) -> str:
    """8 hexadecimal digits that tell some prompts from others."""
    return f"{zlib.crc32(json.dumps(prompts).encode()):08x}"


def score(prompt: Prompt, answer: str) -> float:
    """0 to 1."""
    task = TASKS[prompt.task]
    if task.line:
        answer = answer.lstrip("\n").split("\n")[0]
    return max(task.metric(answer, gold, prompt.classes) for gold in prompt.gold)


def tokens(prompt: Prompt, tokenizer: Any, length: int) -> torch.Tensor:
    """int64 [L], which leave room for the answer in `length`: where the prompt is longer, its
    middle is left out. A message to a chat model where the tokenizer has a template. Raises
    ValueError if `length` has room for none of the prompt."""
    task = TASKS[prompt.task]
    before = after = ""
    if tokenizer.chat_template and not task.plain:
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
        )
        before, after = template.split("\0")
    first, middle, last = (
        torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        for part in (before, prompt.text, after)
    )
    around = task.tokens + len(first) + len(last)
    room = length - around
    if room < 1:
        raise ValueError(
            f"--length: expected more than the {around} tokens around a prompt of {prompt.task}, "
            f"got {length}"
        )
    if len(middle) > room:
        middle = torch.cat([middle[: room // 2], middle[len(middle) - (room - room // 2) :]])
    return torch.cat([first, middle, last])
