# SPDX-License-Identifier: Apache-2.0
"""The ranks of a torch.distributed group, and their local work between collectives."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
Steps: TypeAlias = Generator[Callable[[], torch.Tensor], torch.Tensor, T]
"""Local work that yields its collectives and receives their results. An error between two
collectives on one rank is raised on every rank (see :func:`run`)."""


class Peers:
    """The ranks of a group and the collectives between them."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # The device for small messages, independent of the device of a rank's tensors.
        hosts = "cpu" in str(dist.get_backend_config(group))
        self.device = torch.device("cpu" if hosts else f"cuda:{torch.cuda.current_device()}")

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, of equal shapes, as [ranks, …]."""
        local = local.contiguous()
        out = local.new_empty(self.size, *local.shape)
        dist.all_gather(list(out.unbind()), local, group=self.group)
        return out

    def add(self, local: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of an integer tensor, in place."""
        dist.all_reduce(local, group=self.group)
        return local

    def first(self, local: torch.Tensor) -> torch.Tensor:
        """The tensor of the first rank."""
        local = local.contiguous()
        dist.broadcast(local, group=self.group, group_src=0)
        return local

    def agree(self, error: Exception | None) -> None:
        """Raises on every rank if one has an error."""
        failed = torch.tensor([int(error is not None)], device=self.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self.group)
        if not failed.item():
            return
        errors: list[str | None] = [None] * self.size
        dist.all_gather_object(errors, error and repr(error), group=self.group)
        if error is not None:
            raise error
        raise RuntimeError("; ".join(f"rank {i}: {e}" for i, e in enumerate(errors) if e))


def run(peers: Peers, steps: Steps[T]) -> T:
    """Runs the steps of this rank and their collectives; stops if a step fails on any rank."""
    received: torch.Tensor | None = None
    while True:
        collective = result = error = None
        try:
            collective = steps.send(received)
        except StopIteration as stop:
            result = stop.value
        except Exception as raised:
            error = raised
        peers.agree(error)
        if collective is None:
            return cast(T, result)
        received = collective()
