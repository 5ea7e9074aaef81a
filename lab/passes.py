# SPDX-License-Identifier: Apache-2.0
"""Measurements that go on where they stopped: their file, and the passes that it lacks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `path` holds, or a new state. Raises ValueError if it is of other settings."""
    state = json.loads(path.read_text()) if path.exists() else {"settings": settings}
    if state["settings"] != settings:
        raise ValueError(f"{path}: expected the settings {settings}, got {state['settings']}")
    return state


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
