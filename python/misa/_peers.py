# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a torch.distributed group send each other, and how they fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Peers:
    """The ranks of a group (None: the default group). What is on a CUDA device is sent on its
    current stream."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group or dist.group.WORLD
        self.rank = self.group.rank()
        self.size = self.group.size()

    def gather(self, *local: torch.Tensor) -> list[torch.Tensor]:
        """For each of these tensors, of one dtype, those of all ranks, of equal shapes and
        contiguous, as [ranks, …]. One collective, since the host takes as long to start each."""
        every = [mine.new_empty(self.size, *mine.shape) for mine in local]
        sent = [(into, mine) for into, mine in zip(every, local, strict=True) if mine.numel() > 0]
        outputs, inputs = [into.flatten(0, 1) for into, _ in sent], [mine for _, mine in sent]
        if len(sent) == 1:
            dist.all_gather_into_tensor(outputs[0], inputs[0], group=self.group)
        elif sent:
            options = dist.distributed_c10d.AllgatherOptions()
            options.asyncOp = False
            work = self.group.allgather_into_tensor_coalesced(outputs, inputs, options)
            if work is not None:  # as that of gloo is
                work.wait()
        return every

    def objects(self, mine: Any, device: torch.device) -> list[Any]:
        """An object of every rank."""
        every: list[Any] = [None] * self.size
        with torch.cuda.device(device if device.type == "cuda" else -1):
            dist.all_gather_object(every, mine, group=self.group)
        return every


class Attempt:
    """Steps of one rank. Once one has failed, the later ones are left out, but the rank goes on to
    join the collectives, so that no rank waits for it."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, step: Callable[[], T]) -> T | None:
        if self.error is None:
            try:
                return step()
            except Exception as error:
                self.error = error
        return None

    def raise_together(self, peers: Peers, device: torch.device, failed: bool) -> None:
        """Raises on every rank if one has failed, which all of them know."""
        if not failed:
            return
        errors = peers.objects(self.error and repr(self.error), device)
        if self.error is not None:
            raise self.error
        raise RuntimeError("; ".join(f"rank {i}: {e}" for i, e in enumerate(errors) if e))
