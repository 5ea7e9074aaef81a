# SPDX-License-Identifier: Apache-2.0
"""Writes what the distilled indexers of a model are given and say, as traces for `misa compare`.

    python -m lab.traces FOLDER OUT --text FILE... [--length 16384] [--layers 0 7 15]

One trace a layer, of one held-out window: 64 queries spread over the second half and the last 32 in
a row, with the dense attention of these, averaged over heads (docs/formats.md has the fields).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import base
from .indexer import Indexer
from .trained import parser_of, trained

SPREAD, LAST = 64, 32


def queries(length: int) -> torch.Tensor:
    """Positions that ask."""
    first = length // 2
    spread = first + torch.arange(SPREAD) * (length - LAST - first) // SPREAD
    return torch.cat([spread, torch.arange(length - LAST, length)])


@torch.no_grad()
def trace(
    indexer: Indexer, module: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors of a layer's trace: q [T, H, 128], w [T, H], k [L, 128], ks and ke [T], and
    attn_last32 [32, L]."""
    rows = queries(hidden.shape[0]).to(hidden.device)
    q, w, k = indexer(hidden, cos, sin, rows)
    tensors = {
        "q": q.bfloat16(),
        "w": w.float(),
        "k": k.bfloat16(),
        "ks": torch.zeros_like(rows, dtype=torch.int32),
        "ke": (rows + 1).int(),
        "attn_last32": base.attention(module, hidden, cos, sin, rows[-LAST:]).bfloat16(),
    }
    return {name: value.contiguous().cpu() for name, value in tensors.items()}


def write(
    model: Any, indexers: Any, ids: torch.Tensor, out: Path, layers: list[int], source: str
) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def see(i: int, module: Any, hidden: Any, cos: Any, sin: Any) -> None:
        if i not in layers:
            return
        path = out / f"trace_h{indexers[i].heads}_layer{i}.safetensors"
        found = trace(indexers[i], module, hidden.float(), cos.float(), sin.float())
        save_file(found, path, metadata={"source": source})
        written.append(path)

    with torch.no_grad(), base.watched(model, see):
        model.model(ids[None], use_cache=False)
    return written


def main() -> int:
    parser = parser_of("lab.traces", __doc__, length=16384)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="*", help="all if not given")
    parser.add_argument("--window", type=int, default=0, help="another number, another window")
    options = parser.parse_args()
    given = trained(parser, options, seed=0, device=torch.device("cpu"))
    layers = options.layers if options.layers is not None else list(range(given.shape.layers))
    source = f"{given.base.name}, indexers distilled for {given.step} steps{given.base.note}"
    source += f", window {options.window} of {options.length} tokens"
    ids = given.windows[options.window]
    for path in write(given.model, given.indexers, ids, options.out, layers, source):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
