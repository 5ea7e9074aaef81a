# SPDX-License-Identifier: Apache-2.0
"""Indexers as DeepSeek-V3.2 has them, one for each layer of the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

DIM, ROTATED = 128, 64  # of a head; of them the first have RoPE
FILE_BYTES = 16 << 20


class Shape(NamedTuple):
    """layers, and the width of their hidden states; heads; rank of the queries, which in
    DeepSeek-V3.2 are made from the compressed queries of attention."""

    layers: int
    width: int
    heads: int
    rank: int


class Indexer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.compress = nn.Linear(shape.width, shape.rank, bias=False)
        self.query = nn.Linear(shape.rank, shape.heads * DIM, bias=False)
        self.key = nn.Linear(shape.width, DIM, bias=False)
        self.key_norm = nn.LayerNorm(DIM)
        self.weight = nn.Linear(shape.width, shape.heads, bias=False)

    def forward(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [rows, H, 128], w [rows, H] with H^-1/2 128^-1/2 folded in, and k [L, 128]."""
        asking = hidden[rows]
        q = self.query(self.compress(asking)).view(-1, self.heads, DIM)
        k = self.key_norm(self.key(hidden))
        w = self.weight(asking) * (self.heads * DIM) ** -0.5
        q = rotate(q, cos[rows, None], sin[rows, None])
        return q, w.float(), rotate(k, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the first 64 dimensions, in halves."""
    turned, rest = x[..., :ROTATED], x[..., ROTATED:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), rest], -1)


def scores(q: torch.Tensor, w: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """float32 [rows, L]: the sum over heads of w max(0, q . k)."""
    return torch.einsum("rh,rhl->rl", w, functional.relu(q @ k.T).float())


def save(folder: Path, indexers: nn.ModuleList, state: dict[str, Any]) -> None:
    """Weights as bfloat16 in files of at most 16 MiB, and `state` in state.json, which is written
    last."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in indexers.state_dict().items():
        value = value.to("cpu", torch.bfloat16).contiguous()
        size += value.nbytes
        if size > FILE_BYTES - (1 << 16) and files[-1]:  # room for the header
            files.append({})
            size = value.nbytes
        files[-1][name] = value
    for i, tensors in enumerate(files):
        replace(folder / f"indexers-{i}.safetensors", lambda path, t=tensors: save_file(t, path))
    text = json.dumps(state, indent=1)
    replace(folder / "state.json", lambda path: path.write_text(text))


def replace(path: Path, write: Any) -> None:
    """Writes a file beside `path` and then renames it, so that it is never half there."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    beside.replace(path)


def state_of(folder: Path) -> dict[str, Any]:
    """What `save` was given as the state; {} where nothing is saved."""
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load(folder: Path, shape: Shape) -> nn.ModuleList:
    """Indexers as they were saved, new ones where nothing is. Raises ValueError for a folder that
    has a state, and no indexers."""
    indexers = nn.ModuleList(Indexer(shape) for _ in range(shape.layers))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("indexers-*.safetensors")):
        tensors |= load_file(path)
    if not tensors and state_of(folder):
        raise ValueError(f"{folder}: expected the indexers too, in indexers-*.safetensors")
    if tensors:
        indexers.load_state_dict({name: value.float() for name, value in tensors.items()})
    return indexers
