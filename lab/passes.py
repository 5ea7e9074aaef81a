# SPDX-License-Identifier: Apache-2.0
"""Runs that go on where they stopped: when training is saved, the file of a measurement, and the
passes that it lacks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

KEPT = 90  # seconds of training between saves: a run that is killed loses no more


def begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `path` holds, or a new state. Raises ValueError if it is of other settings."""
    state = json.loads(path.read_text()) if path.exists() else {"settings": settings}
    if state["settings"] != settings:
        raise ValueError(f"{path}: expected the settings {settings}, got {state['settings']}")
    return state


class Keeping:
    """Saves what is trained by `keep` when that is due."""

    def __init__(self, model: torch.nn.Module, keep: Callable[[], None]) -> None:
        self._model, self._keep = model, keep
        self._last = time.monotonic()

    def now(self, due: bool = False) -> None:
        """Saves if it is due or KEPT seconds have gone by. Raises RuntimeError, and leaves what was
        saved before, if a parameter is not finite."""
        if not due and time.monotonic() - self._last < KEPT:
            return
        for name, value in self._model.named_parameters():
            if not value.isfinite().all():
                raise RuntimeError(f"{name}: expected finite numbers")
        self._keep()
        self._last = time.monotonic()


def work(
    jobs: Sequence[Callable[[], None]],
    keep: Callable[[], None],
    what: str,
    seconds: float,
    say: Callable[[str], None],
) -> None:
    """Does the jobs, and keeps what is known after each, until `seconds` are over. what: the name
    of the jobs in what it says."""
    start = time.monotonic()
    for number, job in enumerate(jobs, 1):
        job()
        keep()
        took = time.monotonic() - start
        left = took / number * (len(jobs) - number)
        say(f"{number} of {len(jobs)} {what}, about {left / 60:.0f} min left")
        if took > seconds:
            break
