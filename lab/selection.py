# SPDX-License-Identifier: Apache-2.0
"""What selections keep of DSA's, on distilled indexers and held-out text.

    python -m lab.selection FOLDER --text FILE... [--length 8192] [--top-k 512] [--layers 0 15 29]

Of each indexer, in the notation of `misa compare`, the recall of DSA's set, and the share that it
keeps of the attention that DSA's set keeps, as means over sampled rows of the last eighth of a
window that see more than k keys, windows and layers, and in each layer, with 95 % intervals by
bootstrap over documents. Beside them the noise floor, DSA on keys rounded to e4m3 (dsa:fp8), and
the last k and k random positions. Prints a table, and writes FOLDER/selection-LENGTH-K.json; of
some layers only FOLDER/layers-LENGTH-K.json, which lab.report does not read.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from . import base, sparse
from .indexer import DIM, replace
from .statistics import interval
from .trained import Sample, asking, parser_of, seen, trained


def grid(top_k: int, heads: int) -> list[sparse.Choice]:
    """What is compared."""
    labels = ["dsa:fp8"]
    labels += [f"misa:h={h}" for h in (4, 8, 16, 32) if h < heads]
    labels += [f"misa:h=8:B={block}" for block in (64, 256)]
    routers = ("self", "dispersion", "nonlinearity", "qnorm", "weight")
    labels += [f"misa:h=8:router={router}" for router in routers]
    labels += [f"misa-dagger:h=8:m={m}k" for m in (2, 4)]
    labels += [f"misa-r:h={h}" for h in (0, 1, 3, 7)]
    labels += [f"misa-r:h=3:m={m}k" for m in (2, 4)]
    # HISA keeps 64 blocks of 128 tokens for a top 2048.
    labels += [f"hisa:blocks={max(2, top_k // 32)}"]
    labels += [f"misa-r:h=3:m={m}k:sketch={bits}:fp8" for bits, m in ((2, 4), (2, 8), (4, 2))]
    labels += [sparse.RECENCY, sparse.RANDOM]
    return [sparse.choice(label, top_k) for label in labels]


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
    sample: Sample,
    choices: list[sparse.Choice],
    rows: int,
    layers: list[int],
) -> list[dict[str, Any]]:
    """A result for each choice: `recall` and `attention`, both for each of `layers`, and the recall
    in each window, for differences between choices."""
    device = next(model.parameters()).device
    top_k = choices[0].top_k
    dsa = sparse.choice("dsa", top_k)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for number, ids in enumerate(sample.windows):
        places = asking(len(ids), seen(len(ids), top_k), rows, number).to(device)

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
            inputs = (*indexers[i](hidden.float(), cos.float(), sin.float(), rows), rows)
            own = sparse.positions(dsa, *inputs)
            for chosen in choices:
                got = sparse.positions(chosen, *inputs, seed=n * 1009 + i)
                found.setdefault((chosen.label, i), []).append(shares(got, own, attention))

        with base.watched(model, see):
            model.model(ids[None].to(device), use_cache=False)

    def summary(of_windows: torch.Tensor) -> dict[str, Any]:
        recall, attention = of_windows.T.tolist()
        return {
            "recall": interval(recall, sample.documents),
            "attention": interval(attention, sample.documents),
        }

    results = []
    for chosen in choices:
        of_layers = torch.tensor([found[chosen.label, i] for i in layers], dtype=torch.float64)
        of_windows = of_layers.mean(0)
        results.append(
            {
                "label": chosen.label,
                **summary(of_windows),
                "recall_by_window": of_windows[:, 0].tolist(),
                "layers": [
                    {"layer": i, **summary(one)} for i, one in zip(layers, of_layers, strict=True)
                ],
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'':<32} {'recall':>8} {'95 %':>15} {'worst layer':>17} {'attention':>10}"]
    for one in results:
        mean, low, high = (100 * x for x in one["recall"])
        worst = min(one["layers"], key=lambda layer: layer["recall"][0])
        lines.append(
            f"{one['label']:<32} {mean:>6.1f} % {low:>6.1f} to {high:>5.1f} "
            f"{100 * worst['recall'][0]:>8.1f} % ({worst['layer']:>3}) "
            f"{100 * one['attention'][0]:>8.1f} %"
        )
    return "\n".join(lines)


def main() -> int:
    parser = parser_of("lab.selection", __doc__, length=8192)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32, help="of a window that ask")
    parser.add_argument("--layers", type=int, nargs="*", help="all if not given")
    options = parser.parse_args()
    if options.top_k >= options.length:
        parser.error(f"--top-k: expected less than --length, got {options.top_k}")
    given = trained(parser, options, seed=2)
    every = list(range(given.shape.layers))
    layers = every if options.layers is None else sorted(set(options.layers))
    if not layers or not set(layers) <= set(every):
        parser.error(f"--layers: expected some of 0 to {every[-1]}, got {options.layers}")
    sample = given.sample(options.windows)
    choices = grid(options.top_k, given.shape.heads)
    results = measure(given.model, given.indexers, sample, choices, options.rows, layers)
    settings = {name: getattr(options, name) for name in ("length", "top_k", "windows", "rows")}
    settings |= {"least": seen(options.length, options.top_k), "documents": sample.documents}
    found = {"step": given.step, "heads": given.shape.heads, "dim": DIM, **settings}
    kind = "selection" if layers == every else "layers"
    path = options.folder / f"{kind}-{options.length}-{options.top_k}.json"
    text_of = json.dumps({**found, "results": results}, indent=1)
    replace(path, lambda beside: beside.write_text(text_of))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
