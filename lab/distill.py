# SPDX-License-Identifier: Apache-2.0
"""Distils an indexer for every layer of a frozen language model from its dense attention.

    python -m lab.distill FOLDER --text FILE... [--base DECODER] [--minutes 8]

The loss of a layer is the divergence KL(p || softmax(scores)) of a row's attention p, averaged
over heads, from what the indexer's scores say, on rows sampled from each window of text. Layers do
not depend on each other. Stops after --minutes, or at --steps; run again, it goes on, and one that
is killed loses what it did in the last minute and a half. Adam's moments are not kept, so it warms
up again. FOLDER gets the indexers in files of at most 16 MiB, the state, and a log of losses.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import base, text
from .decoder import HEADER
from .indexer import DIM, FILE_BYTES, Shape, load, save, scores, state_of
from .passes import Keeping

LOGGED = 20  # steps between entries of the log


class Settings(NamedTuple):
    """What a run must have in common with the one that it goes on with."""

    heads: int
    rank: int
    length: int  # of a window, tokens
    rows: int  # of a window that ask
    steps: int
    rate: float
    warm_up: int
    seed: int
    held_out: int = text.HELD_OUT  # of 16 documents


def divergence(target: torch.Tensor, found: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The mean over rows of KL(target || softmax(found)); both [rows, L], of which a row sees its
    own position and those before it."""
    later = torch.arange(found.shape[1], device=rows.device) > rows[:, None]
    logs = found.masked_fill(later, float("-inf")).log_softmax(-1).masked_fill(later, 0)
    return (torch.special.xlogy(target, target) - target * logs).sum(-1).mean()


def rate_at(settings: Settings, step: int, since_start: int) -> float:
    """A cosine over all steps to a tenth, and a warm-up after every start."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / settings.steps)
    return settings.rate * cosine * min(1, (since_start + 1) / settings.warm_up)


def run(
    model: Any,
    windows: text.Windows,
    folder: Path,
    settings: Settings,
    *,
    name: str = base.SMOLLM2,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains until `settings.steps` or for `seconds`; returns the state. `name` is the model's.

    Raises ValueError if the folder holds a run with other settings, text or another model.
    """
    device = next(model.parameters()).device
    shape = Shape(len(model.model.layers), model.config.hidden_size, settings.heads, settings.rank)
    state = state_of(folder)
    asked = {**settings._asdict(), **shape._asdict()}
    if state.setdefault("settings", asked) != asked:
        raise ValueError(f"{folder}: expected the settings {state['settings']}, got {asked}")
    if state.setdefault("base", name) != name:
        raise ValueError(f"{folder}: expected the {state['base']}, got the {name}")
    text.goes_on(state, windows.digest, folder)
    torch.manual_seed(settings.seed)
    indexers = load(folder, shape).to(device)
    optimizer = torch.optim.AdamW(indexers.parameters(), weight_decay=0.01, betas=(0.9, 0.95))
    state.setdefault("log", [])
    first = state.setdefault("step", 0)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    keeping = Keeping(indexers, lambda: save(folder, indexers, state))
    start, losses = time.monotonic(), torch.zeros(shape.layers, device=device)
    steps = 0  # that are in losses
    for step in range(first, settings.steps):
        if time.monotonic() - start > seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(settings, step, step - first)
        ids = windows[step].to(device)
        chosen = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        rows = torch.randperm(settings.length, generator=chosen)[: settings.rows]
        rows = rows.sort().values.to(device)

        def see(i: int, module: Any, hidden: Any, cos: Any, sin: Any, rows: Any = rows) -> None:
            target = base.attention(module, hidden, cos, sin, rows)
            with torch.enable_grad(), autocast:
                found = scores(*indexers[i](hidden.detach(), cos, sin, rows))
                loss = divergence(target, found, rows)
            loss.backward()
            losses[i] += loss.detach()

        with torch.no_grad(), base.watched(model, see):
            model.model(ids[None], use_cache=False)
        torch.nn.utils.clip_grad_norm_(indexers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"], steps = step + 1, steps + 1
        if (step + 1) % LOGGED == 0 or step + 1 == settings.steps:
            layers = (losses / steps).tolist()
            losses.zero_()
            steps = 0
            mean = sum(layers) / len(layers)
            if not math.isfinite(mean):
                raise RuntimeError(f"step {step}: the loss is {mean}")
            state["log"].append({"step": step + 1, "kl": mean, "layers": layers})
            took = time.monotonic() - start
            left = took / (step + 1 - first) * (settings.steps - step - 1)
            say(f"step {step + 1} of {settings.steps}, KL {mean:.4f}, {left / 60:.1f} min left")
        keeping.now()
    keeping.now(due=True)
    return state


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.distill", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", nargs="+", required=True, help=".txt, .jsonl, also .xz, folders")
    parser.add_argument("--base", type=Path, help="folder of lab.pretrain, SmolLM2 if not given")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--length", type=int, default=8192, help="of a window, tokens")
    parser.add_argument("--rows", type=int, default=128, help="of a window that ask")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=text.HELD_OUT, help="of 16 documents")
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = vars(parser.parse_args())
    folder, minutes = options.pop("folder"), options.pop("minutes")
    paths, decoder = options.pop("text"), options.pop("base")
    settings = Settings(**options)
    if decoder and settings.held_out > text.HELD_OUT:
        parser.error(
            f"--held-out: expected at most {text.HELD_OUT} with --base, which learned the other "
            f"documents, got {settings.held_out}"
        )
    device = base.device()
    start = time.monotonic()
    model, tokenizer, name, _ = base.load(decoder, settings.length, device, base.dtype_on(device))
    widest = max(settings.heads * DIM, model.config.hidden_size)
    most = (FILE_BYTES - HEADER) // (2 * widest)
    if settings.rank > most:
        parser.error(
            f"--rank: expected at most {most}, so that a matrix of {widest} columns fits a file, "
            f"got {settings.rank}"
        )
    learned = text.tokens_of(paths, tokenizer, held_out=False, share=settings.held_out)
    windows = text.Windows(learned, settings.length, settings.seed)
    left = minutes * 60 - (time.monotonic() - start)
    state = run(model, windows, folder, settings, name=name, seconds=left)
    print(json.dumps({"step": state["step"], "steps": settings.steps}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
