# SPDX-License-Identifier: Apache-2.0
"""What selections keep of DSA's, on distilled indexers and held-out text.

    python -m lab.selection FOLDER --text FILE... [--length 8192] [--top-k 512] [--layers 0 15 29]

Of each indexer the recall of DSA's set, and the share that it keeps of the attention that DSA's set
keeps, as means over sampled rows that see more than k keys, windows and layers, with a 95 %
interval by bootstrap over windows, and in the worst layer. Beside them the noise floor, DSA on keys
rounded to e4m3, and the last k and k random positions. Prints a table, and writes
FOLDER/selection-LENGTH-K.json.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import torch

import misa

from . import base
from .indexer import DIM, replace
from .quality import interval
from .trained import asking, parser_of, trained

RECENT, RANDOM = "the last positions", "random positions"


class Entry(NamedTuple):
    """fp8: whether keys and queries are rounded to e4m3 first, as sketches need them."""

    config: misa.Config
    fp8: bool = False


def grid(top_k: int, heads: int) -> dict[str, Entry]:
    """What is compared, by its label."""

    def config(indexer: str, **settings: Any) -> misa.Config:
        return misa.Config(indexer, top_k=top_k, **settings)

    found = {"DSA, e4m3": Entry(config("dsa"), fp8=True)}
    for h in (4, 8, 16, 32):
        if h < heads:
            found[f"MISA {h}"] = Entry(config("misa", heads=h))
    for block in (64, 256):
        found[f"MISA 8, B = {block}"] = Entry(config("misa", heads=8, block=block))
    found["MISA 8, self-score"] = Entry(config("misa", heads=8, router="self"))
    for m in (2, 4):
        candidates = m * top_k
        found[f"MISA† 8, m = {m} k"] = Entry(config("misa-dagger", heads=8, candidates=candidates))
    for h in (1, 3, 7):
        found[f"MISA-R {h} + 1"] = Entry(config("misa-r", heads=h))
    for m in (2, 4):
        label = f"MISA-R 3 + 1, m = {m} k"
        found[label] = Entry(config("misa-r", heads=3, candidates=m * top_k))
    found["HISA"] = Entry(config("hisa"))
    for bits, m in ((2, 4), (2, 8), (4, 2)):
        settings = {"heads": 3, "candidates": m * top_k, "sketch": bits}
        label = f"MISA-R 3 + 1, {bits}-bit sketch, m = {m} k"
        found[label] = Entry(config("misa-r", **settings), fp8=True)
    return found


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [..., D] and the scale of each vector."""
    scale = x.float().abs().amax(-1).clamp_min(1e-4) / 448
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def select(
    entry: Entry, q: torch.Tensor, w: torch.Tensor, k: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Positions int64 [rows, top_k]."""
    bounds = torch.zeros_like(rows).int(), (rows + 1).int()
    if entry.fp8:
        (q, q_scale), (k, k_scale) = rounded(q), rounded(k)
        found = misa.select(q, w * q_scale, k, *bounds, k_scale=k_scale, config=entry.config)
    else:
        found = misa.select(q.bfloat16(), w, k.bfloat16(), *bounds, config=entry.config)
    return found.indices.long()


def shares(chosen: torch.Tensor, dsa: torch.Tensor, attention: torch.Tensor) -> tuple[float, float]:
    """Of rows [rows, k] whose entries differ: the part of DSA's set, and the attention beside its,
    means over rows."""
    marked = torch.zeros_like(attention, dtype=torch.bool).scatter_(1, dsa, True)
    recall = marked.gather(1, chosen).float().mean()
    kept = attention.gather(1, chosen).sum(1) / attention.gather(1, dsa).sum(1)
    return float(recall), float(kept.mean())


@torch.no_grad()
def measure(
    model: Any,
    indexers: Any,
    windows: list[torch.Tensor],
    entries: dict[str, Entry],
    top_k: int,
    rows: int,
    layers: list[int],
) -> list[dict[str, Any]]:
    """One result for each label, RECENT and RANDOM: `recall` and `attention` as [mean, low, high],
    and the mean of each layer's recall."""
    device = next(model.parameters()).device
    dense = Entry(misa.Config("dsa", top_k=top_k))
    found: dict[str, dict[tuple[int, int], tuple[float, float]]] = {}
    for number, ids in enumerate(windows):
        places = asking(len(ids), top_k, rows, number).to(device)

        def see(
            i: int,
            module: Any,
            hidden: Any,
            cos: Any,
            sin: Any,
            rows: Any = places,
            n: int = number,
        ) -> None:
            if i not in layers:
                return
            attention = base.attention(module, hidden, cos, sin, rows)
            q, w, k = indexers[i](hidden.float(), cos.float(), sin.float(), rows)
            own = select(dense, q, w, k, rows)
            chosen = {label: select(entry, q, w, k, rows) for label, entry in entries.items()}
            chosen[RECENT] = rows[:, None] - torch.arange(top_k, device=rows.device)
            draws = torch.Generator().manual_seed(n * 1009 + i)
            chosen[RANDOM] = torch.stack(
                [torch.randperm(int(row) + 1, generator=draws)[:top_k] for row in rows]
            ).to(rows.device)
            for label, indices in chosen.items():
                found.setdefault(label, {})[n, i] = shares(indices, own, attention)

        with base.watched(model, see):
            model.model(ids[None].to(device), use_cache=False)
    results = []
    for label, values in found.items():
        of_windows = [
            [sum(values[n, i][part] for i in layers) / len(layers) for n in range(len(windows))]
            for part in (0, 1)
        ]
        by_layer = {
            i: sum(values[n, i][0] for n in range(len(windows))) / len(windows) for i in layers
        }
        results.append(
            {
                "label": label,
                "recall": interval(of_windows[0]),
                "attention": interval(of_windows[1]),
                "recall_by_layer": by_layer,
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'':<40} {'recall':>8} {'95 %':>15} {'worst layer':>17} {'attention':>10}"]
    for one in results:
        mean, low, high = (100 * x for x in one["recall"])
        layer, worst = min(one["recall_by_layer"].items(), key=lambda item: item[1])
        lines.append(
            f"{one['label']:<40} {mean:>6.1f} % {low:>6.1f} to {high:>5.1f} "
            f"{100 * worst:>8.1f} % ({layer:>3}) {100 * one['attention'][0]:>8.1f} %"
        )
    return "\n".join(lines)


def main() -> int:
    parser = parser_of("lab.selection", __doc__, length=8192)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="of a window that ask")
    parser.add_argument("--layers", type=int, nargs="*", help="all if not given")
    options = parser.parse_args()
    if options.top_k >= options.length:
        parser.error(f"--top-k: expected less than --length, got {options.top_k}")
    given = trained(parser, options, seed=2)
    layers = options.layers if options.layers is not None else list(range(given.shape.layers))
    results = measure(
        given.model,
        given.indexers,
        [given.windows[i] for i in range(options.windows)],
        grid(options.top_k, given.shape.heads),
        options.top_k,
        options.rows,
        layers,
    )
    settings = {name: getattr(options, name) for name in ("length", "top_k", "windows", "rows")}
    found = {"step": given.step, "heads": given.shape.heads, "dim": DIM, **settings}
    path = options.folder / f"selection-{options.length}-{options.top_k}.json"
    text_of = json.dumps({**found, "results": results}, indent=1)
    replace(path, lambda beside: beside.write_text(text_of))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
