# SPDX-License-Identifier: Apache-2.0
"""Where the answers to LongBench's retrieval and QA prompts stand in these."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .longbench import Prompt
from .tasks import Span

TASKS = (
    "passage_retrieval_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "multifieldqa_en",
    "narrativeqa",
    "qasper",
    "triviaqa",
)
LETTERS = 4  # shorter answers, such as `no`, stand anywhere


class Gold(NamedTuple):
    """ids: int64 [L], of the prompt and an answer, without a chat template.

    places: the first positions of what answers it; facts: the lines these are in; answer: where the
    answer is, at the end.
    """

    ids: np.ndarray
    places: list[int]
    facts: list[Span]
    answer: Span


def found(prompt: Prompt, tokenizer: Any) -> Gold | None:
    """With the first of its answers that stands in the prompt as whole words; None if none does.
    What the question itself says, from the last `Question:` on, answers nothing."""
    question = prompt.text.rfind("Question:")
    context = prompt.text[:question] if question >= 0 else prompt.text
    # A paragraph that is to be named has its name at its head; the instructions have examples.
    head = ":" if prompt.task == "passage_retrieval_en" else r"(?!\w)"
    for answer in prompt.gold:
        pattern = r"(?<!\w)" + re.escape(answer) + head
        hits = [m.start() for m in re.finditer(pattern, context, re.IGNORECASE)]
        if len(answer) >= LETTERS and hits:
            break
    else:
        return None
    tokens = tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=False)
    ends = np.array([end for _, end in tokens["offset_mapping"]])

    def token(character: int) -> int:
        return int(np.searchsorted(ends, character, side="right"))

    def line(start: int) -> Span:
        first = prompt.text.rfind("\n", 0, start) + 1
        end = prompt.text.find("\n", start)
        return token(first), token(end if end >= 0 else len(prompt.text) - 1)

    space = "" if prompt.text[-1:].isspace() else " "
    said = tokenizer(space + answer, add_special_tokens=False)["input_ids"]
    ids = np.array(tokens["input_ids"] + said, dtype=np.int64)
    lines: Iterable[Span] = dict.fromkeys(map(line, hits))
    return Gold(ids, [token(hit) for hit in hits], list(lines), (len(ids) - len(said), len(ids)))
