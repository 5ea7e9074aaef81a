# SPDX-License-Identifier: Apache-2.0
"""Trains a decoder from scratch on long contexts, with retrieval tasks in its data.

    python -m lab.pretrain FOLDER --text FILE... [--minutes 8] [--seed 0]

Contexts grow in stages, LENGTH:MILLIONS of tokens each. The loss is the mean over the tokens of
text plus the mean over those of answers. Stops after --minutes, or when the stages are through; run
again, it goes on with the same data as if it had not stopped. The optimizer's moments are not kept,
so it warms up again, and weights are kept in bfloat16. A run that is killed loses what it did in
the last minute and a half. At the end it says how the decoder does on held-out text. FOLDER gets
the decoder in files of at most 16 MiB, its tokenizer, and a log.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from . import base, decoder, tasks, text
from .indexer import FILE_BYTES, state_of
from .passes import Keeping

LOGGED = 100  # steps between entries of the log
STAGES = ["512:40", "2048:80", "8192:100", "16384:80", "32768:60", "65536:40", "131072:40"]
CHECKED = (256, 1024, 4096, 16384, 32768, 65536, 131072)  # lengths at the end of a run, up to
BEYOND = 2  # times what it has come to
CHECKS, ASKED = 8, 4  # contexts of a length and a kind, questions in each
PRIME = 1_000_003


class Stage(NamedTuple):
    length: int  # of a sequence, tokens
    steps: int


class Settings(NamedTuple):
    """What a run must have in common with the one that it goes on with."""

    layers: int
    width: int
    vocabulary: int
    stages: list[str]  # LENGTH:MILLIONS
    batch: int  # tokens of a step, where a sequence is not longer
    rate: float
    warm_up: int
    seed: int


def stages(settings: Settings) -> list[Stage]:
    found = []
    for stage in settings.stages:
        length, millions = stage.split(":")
        tokens = int(length) * sequences(int(length), settings.batch)
        found.append(Stage(int(length), max(1, round(float(millions) * 1e6 / tokens))))
    return found


def sequences(length: int, batch: int) -> int:
    """Of a step."""
    return max(1, batch // length)


class Batches:
    """The ids and roles of a step, each [sequences, length]; a function of the seed and the step
    alone."""

    def __init__(self, maker: tasks.Maker, texts: Sequence[np.ndarray], settings: Settings) -> None:
        self._maker, self._settings = maker, settings
        self._lengths = [stage.length for stage in stages(settings) for _ in range(stage.steps)]
        self._windows = {
            length: text.Windows(texts, length, settings.seed) for length in set(self._lengths)
        }

    def __len__(self) -> int:
        return len(self._lengths)

    def length(self, step: int) -> int:
        """Of its sequences."""
        return self._lengths[step]

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        length = self._lengths[step]
        examples = []
        for i in range(sequences(length, self._settings.batch)):
            haystack = self._windows[length][step * PRIME + i].numpy()
            choice = random.Random(f"{self._settings.seed} {step} {i}")
            examples.append(tasks.mixed(self._maker, haystack, length, choice))
        ids, roles = (np.stack(parts) for parts in list(zip(*examples, strict=True))[:2])
        return torch.from_numpy(ids), torch.from_numpy(roles)


def losses(
    model: Any, ids: torch.Tensor, roles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean loss over text, that over answers, and the share of answers' tokens that the
    decoder says itself; 0 where there are none."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float().flatten(0, 1)
    wanted, kind = ids[:, 1:].flatten(), roles[:, 1:].flatten()
    each = functional.cross_entropy(logits, wanted, reduction="none")
    found = []
    for role in (tasks.TEXT, tasks.ANSWER):
        chosen = (kind == role).float()
        found.append((each * chosen).sum() / chosen.sum().clamp_min(1))
    right = (logits.argmax(-1) == wanted) & (kind == tasks.ANSWER)
    return found[0], found[1], right.sum() / (kind == tasks.ANSWER).sum().clamp_min(1)


def optimizers(model: Any, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, Adam for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, rate, weight_decay=0, betas=(0.9, 0.95)),
    ]


def run(
    model: Any,
    batches: Batches,
    settings: Settings,
    state: dict[str, Any],
    *,
    seconds: float = math.inf,
    workers: int = 0,
    keep: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
) -> None:
    """Trains until the stages are through or for `seconds`; `state` gets the step and the log.

    keep: saves the model and `state`; called now and then, and at the end.
    """
    device = next(model.parameters()).device
    first = state.setdefault("step", 0)
    log = state.setdefault("log", [])
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, len(batches)),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    used = optimizers(model, settings.rate)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    keeping = Keeping(model, keep)
    start = since = time.monotonic()
    # Of losses' three, and how many steps had answers.
    sums, steps, tokens = torch.zeros(4, device=device), 0, 0
    model.train()
    for step, given in enumerate(loader, first):
        rate = rate_at(settings, step, step - first, len(batches))
        for group in (group for optimizer in used for group in optimizer.param_groups):
            group["lr"] = rate
        ids, roles = (part.to(device, non_blocking=True) for part in given)
        with autocast:
            found = losses(model, ids, roles)
        (found[0] + found[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in used:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([*found, (roles[:, 1:] == tasks.ANSWER).any()]).detach()
        steps, tokens = steps + 1, tokens + ids.numel()
        state["step"] = step + 1
        over = step + 1 == len(batches) or time.monotonic() - start > seconds
        if over or steps == LOGGED:
            of_text, of_answers, right, had = sums.tolist()  # waits for the device
            of_text /= steps
            of_answers, right = of_answers / max(had, 1), right / max(had, 1)
            now = time.monotonic()
            if not math.isfinite(of_text + of_answers):
                raise RuntimeError(f"step {step}: the losses are {of_text} and {of_answers}")
            speed = tokens / (now - since)
            entry = {"step": step + 1, "length": ids.shape[1], "tokens_per_second": round(speed)}
            log.append({**entry, "text": of_text, "answers": of_answers, "right": right})
            say(
                f"step {step + 1} of {len(batches)}, length {ids.shape[1]}: text {of_text:.3f}, "
                f"answers {of_answers:.3f}, {100 * right:.1f} % of their tokens right, "
                f"{speed / 1000:.0f} thousand tokens/s, {(now - start) / 60:.1f} min"
            )
            sums.zero_()
            steps, tokens, since = 0, 0, now
        keeping.now(due=over)
        if over:
            break


def begin(
    folder: Path, paths: Sequence[str | Path], settings: Settings
) -> tuple[Any, Any, dict[str, Any]]:
    """The decoder of a folder, its tokenizer and state; new ones where nothing is.

    Raises ValueError if the folder holds a run with other settings.
    """
    state = state_of(folder)
    if state:
        if state["settings"] != settings._asdict():
            raise ValueError(f"{folder}: expected the settings {state['settings']}, got {settings}")
        return *decoder.load(folder, torch.float32), state
    learned = (d.text for d in text.documents(paths) if not text.is_held_out(d.title))
    tokenizer = decoder.tokenizer_of(learned, settings.vocabulary)
    shape = decoder.Shape(settings.layers, settings.width, settings.vocabulary)
    return decoder.new(shape, settings.seed), tokenizer, {"settings": settings._asdict()}


def rate_at(settings: Settings, step: int, since_start: int, steps: int) -> float:
    """A cosine over all steps to a tenth, and a warm-up after every start."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return settings.rate * cosine * min(1, (since_start + 1) / settings.warm_up)


@torch.no_grad()
def check(
    model: Any, maker: tasks.Maker, texts: Sequence[np.ndarray], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """For each length the loss on held-out text, and the share of exact answers to needles spread
    over a context and to lines of a list that fills it."""
    found = []
    for length in lengths:
        windows, _ = text.Windows(texts, length, seed=3).spread(CHECKS)
        right: dict[str, list[bool]] = {"needle": [], "list": []}
        of_text = []
        for number, window in enumerate(windows):
            haystack, choice = window.numpy(), random.Random(number)
            plain = tasks.compose(haystack, [], length)
            ids, roles = (
                torch.from_numpy(part)[None].to(next(model.parameters()).device)
                for part in plain[:2]
            )
            of_text.append(float(losses(model, ids, roles)[0]))
            depths = [(i + choice.random()) / ASKED for i in range(ASKED)]
            choice.shuffle(depths)
            examples = {
                "needle": tasks.needles(maker, haystack, length, depths, choice),
                "list": tasks.listed(maker, haystack, length, ASKED, choice),
            }
            for kind, example in examples.items():
                right[kind] += [one.exact for one in tasks.answered(model, example)]
        shares = {kind: sum(values) / len(values) for kind, values in right.items()}
        counted = {"length": length, "questions": CHECKS * ASKED, "text": sum(of_text) / CHECKS}
        found.append({**counted, **shares})
    return found


def table(checks: list[dict[str, Any]]) -> str:
    lines = [f"{'length':>7} {'text, loss':>11} {'needles':>8} {'list':>8}"]
    for one in checks:
        shares = " ".join(f"{100 * one[kind]:>6.1f} %" for kind in ("needle", "list"))
        lines.append(f"{one['length']:>7} {one['text']:>11.3f} {shares}")
    return "\n".join(lines)


def _stage(given: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*:[0-9]*\.?[0-9]+", given):
        raise argparse.ArgumentTypeError(f"expected LENGTH:MILLIONS, got {given!r}")
    return given


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.pretrain", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", nargs="+", required=True, help=".txt, .jsonl, also .xz, folders")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=4096)
    stages_help = "LENGTH:MILLIONS of tokens"
    parser.add_argument("--stages", nargs="+", default=STAGES, type=_stage, help=stages_help)
    parser.add_argument("--batch", type=int, default=32768, help="of a step, tokens")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--workers", type=int, default=0, help="processes that make data")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    options = vars(parser.parse_args())
    folder, minutes, paths = (options.pop(name) for name in ("folder", "minutes", "text"))
    workers, compiled = options.pop("workers"), options.pop("compile")
    settings = Settings(**options)
    if settings.width % decoder.HEAD_DIM or settings.width < 1:
        parser.error(f"--width: expected a multiple of {decoder.HEAD_DIM}, got {settings.width}")
    most = (FILE_BYTES - decoder.HEADER) // (2 * settings.width)  # rows of bfloat16 in a file
    if settings.vocabulary > most:
        parser.error(
            f"--vocabulary: expected at most {most}, whose embedding of --width {settings.width} "
            f"fits a file, got {settings.vocabulary}"
        )
    start, device = time.monotonic(), base.device()
    try:
        model, tokenizer, state = begin(folder, paths, settings)
        maker = tasks.Maker(tokenizer)
        learned = text.tokens_of(paths, tokenizer, held_out=False)
        text.goes_on(state, text.digest(learned), folder)
        batches = Batches(maker, learned, settings)
    except ValueError as error:
        parser.error(str(error))
    for last in state.get("checks", [])[-1:]:
        if last["step"] == len(batches):
            print(table(last["lengths"]))
            return 0
    model.to(device)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    left = minutes * 60 - (time.monotonic() - start)

    def keep() -> None:
        decoder.save(folder, model, tokenizer, state)

    run(model, batches, settings, state, seconds=left, workers=workers, keep=keep)
    held_out = text.tokens_of(paths, tokenizer, held_out=True)
    longest = min(BEYOND * batches.length(state["step"] - 1), sum(map(len, held_out)))
    model.to(base.dtype_on(device)).eval()
    with torch.compiler.set_stance("force_eager"):
        lengths = [length for length in CHECKED if length <= longest]
        found = check(model, maker, held_out, lengths)
    state.setdefault("checks", []).append({"step": state["step"], "lengths": found})
    keep()
    print(table(found))
    print(json.dumps({"step": state["step"], "steps": len(batches)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
