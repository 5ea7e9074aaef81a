# SPDX-License-Identifier: Apache-2.0
"""What the programs that use distilled indexers begin with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import base, text
from .indexer import Shape, load, state_of


class Sample(NamedTuple):
    """Windows of text int64 [length], and which document each is of."""

    windows: list[torch.Tensor]
    documents: list[int]


class Trained(NamedTuple):
    """The indexers of a folder of lab.distill after `step` steps, the model that they are of, and
    windows of held-out text."""

    step: int
    shape: Shape
    indexers: Any
    base: base.Base
    windows: text.Windows

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def text(self) -> str:
        """The digest of the held-out text."""
        return self.windows.digest

    def sample(self, count: int) -> Sample:
        """Windows of as many documents as can be."""
        return Sample(*self.windows.spread(count))


def parser_of(program: str, description: str | None, length: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="of lab.distill")
    parser.add_argument("--text", nargs="+", required=True, help=".txt, .jsonl, also .xz, folders")
    parser.add_argument("--length", type=int, default=length, help="of a window, tokens")
    parser.add_argument("--base", type=Path, help="folder of lab.pretrain, SmolLM2 if not given")
    return parser


def trained(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    seed: int,
    device: torch.device | None = None,
) -> Trained:
    """Of the options of `parser_of`; on the CPU, or a CUDA device if there is one, unless a device
    is given. `seed` is that of the windows."""
    state = state_of(options.folder)
    if not state:
        parser.error(f"{options.folder}: expected a folder of lab.distill, with a state.json")
    shape = Shape(*(state["settings"][name] for name in Shape._fields))
    try:
        indexers = load(options.folder, shape)
    except ValueError as error:
        parser.error(str(error))
    device = device or base.device()
    try:
        found = base.load(options.base, options.length, device, base.dtype_on(device))
    except ValueError as error:
        parser.error(f"--base: {error}")
    expected = state.get("base", base.SMOLLM2)
    if expected != found.name:
        parser.error(f"--base: expected the {expected}, got the {found.name}")
    share = state["settings"].get("held_out", text.HELD_OUT)
    held_out = text.tokens_of(options.text, found.tokenizer, held_out=True, share=share)
    windows = text.Windows(held_out, options.length, seed)
    return Trained(state["step"], shape, indexers.to(device), found, windows)


LATE = 8  # rows of the last of so many parts of a window ask


def seen(length: int, top_k: int) -> int:
    """How many keys the rows that ask see at the least: those of the last eighth, so that they say
    something of contexts of `length`, and more than top_k."""
    return max(top_k, length - length // LATE) + 1


def asking(length: int, least: int, rows: int, number: int) -> torch.Tensor:
    """Some positions of window `number` that see `least` keys or more, in order."""
    generator = torch.Generator().manual_seed(number)
    chosen = torch.randperm(length - least + 1, generator=generator)[:rows]
    return (least - 1 + chosen).sort().values
