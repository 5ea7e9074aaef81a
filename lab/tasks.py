# SPDX-License-Identifier: Apache-2.0
"""Retrieval tasks, in tokens: facts in a haystack of text, and questions for them.

A needle is a sentence, `The code of NAME is 12345.`; a list has lines `NAME: WORD WORD`; a copy is
a string of words. A question repeats the words before a value and then has the value as its answer.
A name is two words. Words are single tokens of the tokenizer, so that where everything sits is
known without looking for it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

NOT_LEARNED, TEXT, ANSWER = 0, 1, 2  # roles of tokens
WORDS = 1024  # to choose from, at most
# Before and behind a name, and behind a value.
TEMPLATES = {"needle": ("\nThe code of", " is ", ".\n"), "list": ("\n", ":", "")}

Tokens = list[int]
Span = tuple[int, int]  # the first position and the one behind the last


class Piece(NamedTuple):
    """What is put into a haystack.

    place: the part of the haystack before it, 0 to 1.
    value: where in its tokens its value is, which is the answer if it asks for another piece.
    asks: the number of that piece, or -1.
    """

    place: float
    tokens: Tokens
    value: Span
    asks: int = -1


class Question(NamedTuple):
    """Positions in an example: of the fact, of the value in it, and of the answer."""

    fact: Span
    value: Span
    answer: Span


class Example(NamedTuple):
    """ids: int64 [L]; roles: uint8 [L], of each token."""

    ids: np.ndarray
    roles: np.ndarray
    questions: list[Question]


def compose(haystack: np.ndarray, pieces: Sequence[Piece], length: int) -> Example:
    """An example of `length` tokens: the pieces, and as much of the haystack as there is room for.
    Pieces at the same place stay in their order.

    Raises ValueError if there is not enough room or haystack, or if a piece asks for a later one.
    """
    room = length - sum(len(piece.tokens) for piece in pieces)
    if not 0 <= room <= len(haystack):
        raise ValueError(f"length: expected room for 0 to {len(haystack)} tokens, got {room}")
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].place)
    parts: list[Any] = []
    starts: dict[int, int] = {}
    roles = np.full(length, TEXT, dtype=np.uint8)
    questions = []
    cut = 0  # of the haystack is in front
    at = 0
    for number in order:
        piece = pieces[number]
        upto = int(piece.place * room)
        parts += [haystack[cut:upto], piece.tokens]
        at += upto - cut
        cut = upto
        roles[at : at + len(piece.tokens)] = NOT_LEARNED
        if piece.asks >= 0:
            if piece.asks not in starts:
                raise ValueError(f"piece {number}: expected to ask for an earlier one")
            fact, first = pieces[piece.asks], starts[piece.asks]
            span = (at + piece.value[0], at + piece.value[1])
            roles[slice(*span)] = ANSWER
            value = (first + fact.value[0], first + fact.value[1])
            questions.append(Question((first, first + len(fact.tokens)), value, span))
        starts[number] = at
        at += len(piece.tokens)
    parts.append(haystack[cut:room])
    return Example(np.concatenate(parts).astype(np.int64), roles, questions)


class Maker:
    """Makes facts and questions for a tokenizer.

    Raises ValueError if the tokenizer has not enough words, or not every digit, as tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        words = [i for word, i in vocabulary.items() if re.fullmatch("Ġ[a-z]{4,8}", word)]
        self.words = sorted(words)[:WORDS]  # earlier tokens are more frequent
        digits = [vocabulary[digit] for digit in "0123456789" if digit in vocabulary]
        if len(self.words) < 16 or len(digits) < 10:
            raise ValueError(
                "tokenizer: expected 16 words and 10 digits as tokens, "
                f"got {len(self.words)} and {len(digits)}"
            )
        self._values = {"needle": (digits, 5), "list": (self.words, 2)}
        self._templates = {
            kind: tuple(tokenizer(part)["input_ids"] if part else [] for part in parts)
            for kind, parts in TEMPLATES.items()
        }

    def names(self, count: int, choice: random.Random) -> list[Tokens]:
        """Names that all differ."""
        n = len(self.words)
        numbers = choice.sample(range(n * n), count)
        return [[self.words[i // n], self.words[i % n]] for i in numbers]

    def fact(self, kind: str, name: Tokens, place: float, choice: random.Random) -> Piece:
        """A needle, or a line of a list, with a value of its own."""
        before, middle, after = self._templates[kind]
        first = len(before) + len(name) + len(middle)
        tokens, count = self._values[kind]
        value = choice.choices(tokens, k=count)
        return Piece(place, before + name + middle + value + after, (first, first + count))

    def copy(self, count: int, place: float, choice: random.Random) -> Piece:
        """Words, of which the first two tell which ones follow."""
        return Piece(place, choice.choices(self.words, k=count), (2, count))


def question(number: int, fact: Piece, place: float = 1.0) -> Piece:
    """What asks for fact `number`, at the end if no place is given."""
    return Piece(place, fact.tokens[: fact.value[1]], fact.value, number)


def mixed(maker: Maker, haystack: np.ndarray, length: int, choice: random.Random) -> Example:
    """An example to learn from: text alone, one in six, or text with facts of every kind and
    questions, which take 5 to 90 % of it. Half of the questions are at the end."""
    pieces: list[Piece] = []
    if choice.random() < 1 / 6:
        return compose(haystack, pieces, length)
    share = math.exp(choice.uniform(math.log(0.05), math.log(0.9)))
    room = int(share * length)
    names = iter(maker.names(room // 4 + 8, choice))

    def asked(number: int) -> Piece:
        fact = pieces[number]
        late = choice.random() < 0.5
        return question(number, fact, 1.0 if late else choice.uniform(fact.place, 1))

    while True:
        kind = choice.choices(("needle", "list", "copy"), (4, 3, 3))[0]
        count = 1
        if kind == "list":
            count = int(math.exp(choice.uniform(math.log(4), math.log(max(5, room / 40)))))
        place, first = choice.random(), len(pieces)
        for _ in range(count):
            if kind == "copy":
                words = int(math.exp(choice.uniform(math.log(8), math.log(96))))
                pieces.append(maker.copy(words, place, choice))
            else:
                pieces.append(maker.fact(kind, next(names), place, choice))
        about = choice.sample(range(first, first + count), count)
        pieces += [asked(number) for number in about]
        room -= sum(len(piece.tokens) for piece in pieces[first:])
        if room < 0:
            del pieces[first:]
            return compose(haystack, pieces, length)


def needles(
    maker: Maker,
    haystack: np.ndarray,
    length: int,
    depths: Sequence[float],
    choice: random.Random,
    others: int = 0,
) -> Example:
    """A needle at each depth, 0 to 1, all asked for at the end in their order, and `others` at
    random that nobody asks for."""
    names = maker.names(len(depths) + others, choice)
    places = [*depths, *(choice.random() for _ in range(others))]
    facts = [
        maker.fact("needle", name, place, choice) for name, place in zip(names, places, strict=True)
    ]
    return compose(haystack, facts + [question(i, facts[i]) for i in range(len(depths))], length)


def listed(
    maker: Maker, haystack: np.ndarray, length: int, asked: int, choice: random.Random
) -> Example:
    """A list as long as fits, of which `asked` lines, spread evenly, are asked for at the end in an
    order by chance."""
    line = len(maker.fact("list", maker.names(1, choice)[0], 0, choice).tokens)
    count = min(length // line - asked, len(maker.words) ** 2)
    facts = [maker.fact("list", name, 0, choice) for name in maker.names(count, choice)]
    about = [(2 * i + 1) * count // (2 * asked) for i in range(asked)]
    choice.shuffle(about)
    return compose(haystack, facts + [question(i, facts[i]) for i in about], length)


class Answered(NamedTuple):
    """exact: whether the model says every token of the answer; log_probability: of the answer."""

    exact: bool
    log_probability: float


@torch.no_grad()
def answered(model: Any, example: Example) -> list[Answered]:
    """How a model, in one pass, answers each question. The most likely tokens after the right ones
    are those that it would have said itself, up to the first wrong one."""
    ids = torch.from_numpy(example.ids).to(next(model.parameters()).device)
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0]
    found = []
    for first, end in (question.answer for question in example.questions):
        logs = model.lm_head(hidden[first - 1 : end - 1]).float().log_softmax(-1)
        wanted = ids[first:end]
        exact = bool((logs.argmax(-1) == wanted).all())
        found.append(Answered(exact, float(logs.gather(1, wanted[:, None]).sum())))
    return found
