# SPDX-License-Identifier: Apache-2.0
"""How good distilled indexers are, before anything is claimed with them.

    python -m lab.quality FOLDER --text FILE... [--length 8192] [--top-k 512 2048] [--windows 16]

Of the dense attention of held-out text, averaged over heads, the share that k positions keep in
each layer: the best ones (no selection keeps more), those that the indexer selects, the last ones,
and random ones. Each is a mean over sampled rows of the last eighth of a window, with a 95 %
interval by bootstrap over documents; so is what the indexer keeps more than the last positions do.
Prints a table, and writes FOLDER/quality-LENGTH.json.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from . import base
from .indexer import replace, scores
from .statistics import difference, interval
from .trained import Sample, asking, parser_of, seen, trained

CHOICES = ("best", "indexer", "recent", "random")


def kept(
    attention: torch.Tensor, found: torch.Tensor, rows: torch.Tensor, top_k: int, seed: int
) -> dict[str, float]:
    """The mean share of attention, both [rows, L], that top_k positions of each choice keep. Rows
    see more than top_k positions, their own among them."""
    later = torch.arange(attention.shape[1], device=rows.device) > rows[:, None]
    random = torch.rand(attention.shape, generator=torch.Generator().manual_seed(seed))
    recent = torch.arange(attention.shape[1], device=rows.device, dtype=torch.float32)
    orders = {
        "best": attention,
        "indexer": found.float(),
        "recent": recent.expand_as(attention),
        "random": random.to(rows.device),
    }
    shares = {}
    for name, order in orders.items():
        chosen = order.masked_fill(later, float("-inf")).topk(top_k, dim=1).indices
        shares[name] = float(attention.gather(1, chosen).sum(1).mean())
    return shares


def summary(shares: list[dict[str, float]], documents: list[int]) -> dict[str, Any]:
    """Of windows' shares: each choice's, and `over_recent`, the indexer's less the last ones'."""
    of = {name: [share[name] for share in shares] for name in CHOICES}
    return {
        **{name: interval(values, documents) for name, values in of.items()},
        "over_recent": difference(of["indexer"], of["recent"], documents),
    }


@torch.no_grad()
def measure(
    model: Any, indexers: Any, sample: Sample, top_ks: list[int], rows: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """An entry for each layer and k, and one for the layers' mean and k: the choices' shares."""
    device = next(model.parameters()).device
    shares: dict[tuple[int, int], list[dict[str, float]]] = {}
    for number, ids in enumerate(sample.windows):
        places = asking(len(ids), seen(len(ids), max(top_ks)), rows, number).to(device)

        def see(i: int, module: Any, hidden: Any, cos: Any, sin: Any, rows: Any = places) -> None:
            attention = base.attention(module, hidden, cos, sin, rows)
            found = scores(*indexers[i](hidden.float(), cos.float(), sin.float(), rows))
            for top_k in top_ks:
                share = kept(attention, found, rows, top_k, seed=i)
                shares.setdefault((i, top_k), []).append(share)

        with base.watched(model, see):
            model.model(ids[None].to(device), use_cache=False)
    layers = [
        {"layer": layer, "top_k": top_k, **summary(found, sample.documents)}
        for (layer, top_k), found in sorted(shares.items())
    ]
    means = []
    for top_k in top_ks:
        of_layers = [found for (_, k), found in shares.items() if k == top_k]
        of_windows = [
            {name: sum(share[name] for share in found) / len(found) for name in CHOICES}
            for found in zip(*of_layers, strict=True)
        ]
        means.append({"top_k": top_k, **summary(of_windows, sample.documents)})
    return layers, means


def table(entries: list[dict[str, Any]]) -> str:
    lines = [f"{'layer':>5} {'k':>6} " + " ".join(f"{name:>9}" for name in CHOICES)]
    for entry in entries:
        cells = " ".join(f"{100 * entry[name][0]:>8.1f}%" for name in CHOICES)
        lines.append(f"{entry['layer']:>5} {entry['top_k']:>6} {cells}")
    return "\n".join(lines)


def main() -> int:
    parser = parser_of("lab.quality", __doc__, length=8192)
    parser.add_argument("--top-k", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64, help="of a window that ask")
    options = parser.parse_args()
    most = seen(options.length, 0) - 1
    if max(options.top_k) > most:  # of another k other rows would ask
        parser.error(f"--top-k: expected at most {most}, 7/8 of --length, got {max(options.top_k)}")
    given = trained(parser, options, seed=1)
    sample = given.sample(options.windows)
    layers, means = measure(given.model, given.indexers, sample, options.top_k, options.rows)
    settings = {name: getattr(options, name) for name in ("length", "windows", "rows")}
    settings |= {"least": seen(options.length, 0), "documents": sample.documents}
    found = {"step": given.step, **settings, "layers": layers, "means": means}
    path = options.folder / f"quality-{options.length}.json"
    replace(path, lambda beside: beside.write_text(json.dumps(found, indent=1)))
    print(table(layers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
