# SPDX-License-Identifier: Apache-2.0
"""Text to train and evaluate on: any files, split by document."""

from __future__ import annotations

import json
import lzma
import random
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

# Of 16 documents this many are held out from training: enough of a hundred books for intervals over
# documents, also in contexts that take several books each.
HELD_OUT, OF = 3, 16


class Document(NamedTuple):
    title: str
    text: str


def documents(paths: Sequence[str | Path]) -> Iterator[Document]:
    """Every .txt file is one document, every line of a .jsonl file another, with the fields `text`
    and, if any, `title`; both may be compressed (.xz). Folders are searched for them. Without a
    title the name of the file is one, the same whether it is compressed or not.

    Raises ValueError for a file of another kind, or without text.
    """
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if kind(p))
            yield from documents(inside)
            continue
        opened = lzma.open if path.suffix == ".xz" else open
        name = path.name.removesuffix(".xz")
        if kind(path) == ".txt":
            with opened(path, "rt", encoding="utf-8") as file:
                yield Document(name, file.read())
        elif kind(path) == ".jsonl":
            with opened(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    entry = json.loads(line)
                    if not isinstance(entry.get("text"), str):
                        raise ValueError(f"{path}, line {number}: expected a field text")
                    yield Document(str(entry.get("title", f"{name}:{number}")), entry["text"])
        else:
            raise ValueError(f"{path}: expected .txt or .jsonl, also with .xz, or a folder")


def kind(path: Path) -> str:
    """.txt, .jsonl or nothing."""
    name = path.name.removesuffix(".xz")
    return next((k for k in (".txt", ".jsonl") if name.endswith(k)), "")


def is_held_out(title: str, share: int = HELD_OUT) -> bool:
    """Whether it is one of `share` in 16: by the title alone, so that the split is the same in
    every run and for every set of files. What a smaller share holds out, a larger one does too."""
    return zlib.crc32(title.encode()) % OF < share


def digest(texts: Sequence[np.ndarray]) -> str:
    """8 hexadecimal digits that tell the tokens of some documents from others."""
    found = 0
    for tokens in texts:
        found = zlib.crc32(np.ascontiguousarray(tokens), zlib.crc32(b"%d " % len(tokens), found))
    return f"{found:08x}"


def goes_on(state: dict[str, Any], learned: str, folder: Path) -> None:
    """Notes in the state of a folder the digest of the text that is learned; in a state from before
    there were digests, too. Raises ValueError if other text was learned."""
    before = state.setdefault("text", learned)
    if before != learned:
        raise ValueError(f"{folder}: expected the text with the digest {before}, got {learned}")


class Windows:
    """Stretches of tokens, each a function of the seed and its number alone."""

    def __init__(self, texts: Sequence[np.ndarray], length: int, seed: int) -> None:
        """texts: the tokens of each document; those shorter than `length` are put together, in
        order, until they are not."""
        joined: list[np.ndarray] = []
        for tokens in texts:
            if joined and len(joined[-1]) < length:
                joined[-1] = np.concatenate([joined[-1], tokens])
            else:
                joined.append(tokens)
        self._texts = [tokens for tokens in joined if len(tokens) >= length]
        if not self._texts:
            total = sum(len(tokens) for tokens in texts)
            raise ValueError(f"text: expected {length} tokens or more, got {total}")
        self._places = [len(tokens) - length + 1 for tokens in self._texts]
        self._length = length
        self._seed = seed

    @cached_property
    def digest(self) -> str:
        """Of the text that windows are of."""
        return digest(self._texts)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Window `number`, int64 [length]; every place of the text is as likely."""
        choice = random.Random(f"{self._seed} {number}")
        (index,) = choice.choices(range(len(self._texts)), weights=self._places)
        return self._window(index, choice)

    def spread(self, count: int) -> tuple[list[torch.Tensor], list[int]]:
        """Windows, and which document each is of: of all documents in turn, so that no more windows
        than need be are of one. Short documents that were put together are one."""
        choice = random.Random(f"{self._seed} spread")
        turn = choice.sample(range(len(self._texts)), len(self._texts))
        documents = [turn[i % len(turn)] for i in range(count)]
        return [self._window(index, choice) for index in documents], documents

    def _window(self, index: int, choice: random.Random) -> torch.Tensor:
        first = choice.randrange(self._places[index])
        return torch.from_numpy(self._texts[index][first : first + self._length].astype(np.int64))


def tokens_of(
    paths: Sequence[str | Path], tokenizer: Any, held_out: bool, share: int = HELD_OUT
) -> list[np.ndarray]:
    """The tokens of the documents of one side of the split."""
    texts = [d.text for d in documents(paths) if is_held_out(d.title, share) == held_out]
    # All in one call, which the tokenizer spreads over the machine's threads.
    found = tokenizer(texts)["input_ids"] if texts else []
    return [np.asarray(ids, dtype=np.int32) for ids in found]
