# SPDX-License-Identifier: Apache-2.0
"""What `evaluate` measures, and how sums over chunks become its figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

_BLOCK = 32  # positions whose distributions are in memory in double precision at once


def compare_logits(
    own: torch.Tensor, other: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Two models' logits [P, V] at P positions, and the tokens int64 [P] that come next.

    Returns [P] each: `kl`, that of own from other in nats; `top1`, whether the likeliest token is
    the same; `own_loss` and `loss`, the cross-entropy of the next token, in nats.
    """
    parts = []
    for a, b, t in zip(own.split(_BLOCK), other.split(_BLOCK), targets.split(_BLOCK), strict=True):
        a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
        parts.append(
            {
                "kl": (a.exp() * (a - b)).sum(-1),
                "top1": (a.argmax(-1) == b.argmax(-1)).double(),
                "own_loss": -a.gather(-1, t[:, None])[:, 0],
                "loss": -b.gather(-1, t[:, None])[:, 0],
            }
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def mask_of(positions: torch.Tensor, keys: int) -> torch.Tensor:
    """bool [N, keys]: which of the keys are among `positions` [N, K]; -1 is none."""
    mask = torch.zeros(len(positions), keys + 1, dtype=torch.bool, device=positions.device)
    return mask.scatter_(1, positions.long() % (keys + 1), True)[:, :keys]


def recall(own: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """float64 [N]: the share of the positions of `own`, a mask of mask_of, that are in `selected`.

    selected: [N, K] distinct positions; -1 is none.
    """
    found = own.gather(1, selected.long().clamp(min=0)) & (selected >= 0)
    return found.sum(1).double() / own.sum(1)


def attention_on(attention: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """float64 [N]: the sum of `attention` [N, T] at the positions `selected` [N, K]; -1 is none."""
    at = attention.double().gather(1, selected.long().clamp(min=0))
    return at.masked_fill(selected < 0, 0).sum(1)


def processor_seconds() -> tuple[float, float]:
    """How long the threads of this process ran, and waited for a processor; zeros if unknown."""
    running = waiting = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            run, wait, _ = map(int, path.read_text().split())
        except (OSError, ValueError):
            continue
        running, waiting = running + run, waiting + wait
    return running * 1e-9, waiting * 1e-9


def add(sums: dict[str, Any], more: dict[str, Any]) -> None:
    """Adds up numbers and lists of numbers by name; a name that ends with min or max keeps that."""

    def merged(name: str, a: Any, b: Any) -> Any:
        if isinstance(a, list):
            return [merged(name, *pair) for pair in zip(a, b, strict=True)]
        if name.endswith("_min"):
            return min(a, b)
        return max(a, b) if name.endswith("_max") else a + b

    for name, value in more.items():
        sums[name] = merged(name, sums[name], value) if name in sums else value


def _total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Any] = {}
    for part in parts:
        add(sums, part)
    return sums


def _output(sums: dict[str, Any]) -> dict[str, Any]:
    """The figures of positions from their sums."""
    count = sums["positions"]
    means = {name: sums[name] / count for name in ("kl", "top1", "loss", "own_loss")}
    return {"positions": count, **means, "kl_max": sums["kl_max"]}


def _mean_and_worst(layers: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    known = [layer for layer in layers if layer[name] is not None]
    if not known:
        return None
    worst = min(known, key=lambda layer: layer[name])
    mean = statistics.fmean(layer[name] for layer in known)
    return {"mean": mean, "worst": worst[name], "worst_layer": worst["layer"]}


def _speed(layers: list[dict[str, Any]], indexer: int) -> dict[str, Any] | None:
    """How many times faster than DSA: over all layers, and the quartiles of a layer."""
    seconds = [sums["seconds"] for sums in layers if "seconds" in sums]
    if not seconds:
        return None
    ratios = sorted(each[0] / each[indexer] for each in seconds)
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    else:
        low = high = ratios[0]
    whole = sum(each[0] for each in seconds) / sum(each[indexer] for each in seconds)
    return {"times": whole, "quartiles": [low, high]}


def _layer(number: str, sums: dict[str, Any], indexer: int) -> dict[str, Any]:
    """A layer's figures of an indexer; indexer 0 is DSA, and attention[0] the own indexer's."""
    figures: dict[str, Any] = {"layer": int(number)}
    own = "recall" in sums
    figures["recall"] = sums["recall"][indexer] / sums["rows"] if own else None
    figures["recall_min"] = sums["recall_min"][indexer] if own else None
    figures["us_per_query"] = 1e6 * sums["seconds"][indexer] / sums["rows"] if own else None
    attention = sums.get("attention")
    kept = attention[indexer + 1] / attention[0] if attention and attention[0] > 0 else None
    figures["attention_kept"] = kept
    return figures


def summarize(
    texts: list[dict[str, Any]], indexers: int, shares: dict[str, int]
) -> tuple[list[Any], list[Any]]:
    """The figures of each layer, and those of DSA and of `indexers` indexers, from sums of texts.

    A text has `layers`, sums by layer, and `passes`, sums by indexer and range of keys seen.
    `shares` has the layers that select as another does, by layer.
    """
    numbers = sorted({n for text in texts for n in text.get("layers", {})}, key=int)
    sums = {n: _total([t["layers"][n] for t in texts if n in t.get("layers", {})]) for n in numbers}
    layers = []
    for number, each in sums.items():
        rows = each.get("attention_rows")
        layer = {"layer": int(number), "shares": shares.get(number), "rows": each.get("rows")}
        layer["attention_rows"] = rows
        layer["attention_own"] = each["attention"][0] / rows if rows else None
        layers.append(layer)
    results = []
    for indexer in range(indexers + 1):
        figures = [_layer(number, each, indexer) for number, each in sums.items()]
        passes = [t["passes"][str(indexer)] for t in texts if str(indexer) in t.get("passes", {})]
        ranges = sorted({int(keys) for each in passes for keys in each})
        by_keys = [
            {"keys": keys, **_output(_total([p[str(keys)] for p in passes if str(keys) in p]))}
            for keys in ranges
        ]
        whole = [_total(list(each.values())) for each in passes]
        results.append(
            {
                "output": {
                    **_output(_total(whole)),
                    "kl_by_text": [each["kl"] / each["positions"] for each in whole],
                    "by_keys": by_keys,
                }
                if whole
                else None,
                "recall": _mean_and_worst(figures, "recall"),
                "attention_kept": _mean_and_worst(figures, "attention_kept"),
                "less_time": _speed(list(sums.values()), indexer),
                "layers": figures,
            }
        )
    return layers, results
