# SPDX-License-Identifier: Apache-2.0
"""The values by which heads are ranked, from the products of every head with every key.

An analysis: routers of the package compute what they need from means or from sampled keys, and are
asked through the package. What is here needs all products, or is what a router might look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from misa import reference

from .trace import Trace

SIZES = (64, 128, 256, 512, 1024)


def rows(trace: Trace) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each row w [H], q [H, D], and the keys [n, D] that it sees; float32."""
    keys = trace.keys
    for t, query in enumerate(trace.q.float()):
        yield trace.w[t], query, keys[trace.ks[t] : trace.ke[t]]


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.stack([row[name] for row in rows]).double().numpy() for name in rows[0]}


def rest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of products [H, n]: the rms of what the best straight line leaves of max(0, x), and the
    line's slope, 0 where x does not vary; [H] each."""
    dx = x - x.mean(1, keepdim=True)
    r = x.relu()
    dr = r - r.mean(1, keepdim=True)
    variance = dx.square().sum(1)
    slope = torch.where(variance > 0, (dx * dr).sum(1) / variance.clamp_min(1e-30), 0)
    return (dr - slope[:, None] * dx).square().mean(1).sqrt(), slope


@lru_cache(maxsize=8)
def over_keys(trace: Trace) -> dict[str, np.ndarray]:
    """[T, H] each. Over all keys that a row sees: `energy`, `dispersion` and `nonlinearity` of
    |w max(0, x)|, and `fires`, the share of keys with x > 0. For the last one `self`, |w max(0,
    x)|."""
    found = []
    for w, query, seen in rows(trace):
        x = query @ seen.T
        r = x.relu()
        found.append(
            {
                "energy": w.abs() * r.mean(1),
                "dispersion": w.abs() * r.std(1, correction=0),
                "nonlinearity": w.abs() * rest(x)[0],
                "fires": (x > 0).float().mean(1),
                "self": w.abs() * r[:, -1],
            }
        )
    return stacked(found)


def of_sample(trace: Trace) -> dict[str, np.ndarray]:
    """The two parts of MISA-R's G [T, H], which is `rest` + gamma `chance`, from the keys that its
    router samples."""
    found = []
    for w, query, seen in rows(trace):
        sample = seen[torch.from_numpy(reference.sample_positions(len(seen)))]
        left, slope = rest(query @ sample.T)
        kappa = sample.square().mean().sqrt()
        norm = query.norm(dim=1)
        found.append({"rest": w.abs() * left, "chance": w.abs() * norm * kappa * (1 - slope)})
    return stacked(found)


def of_means(trace: Trace, block: int) -> dict[str, np.ndarray]:
    """[T, H] each, over means of blocks: `pooled`, the mean of |w max(0, x)|, `signed`, that of
    w max(0, x), and `deviation`, the standard deviation."""
    found = []
    for w, query, seen in rows(trace):
        means = torch.stack([part.mean(0) for part in seen.split(block)])
        r = (query @ means.T).relu()
        found.append(
            {
                "pooled": w.abs() * r.mean(1),
                "signed": w * r.mean(1),
                "deviation": w.abs() * r.std(1, correction=0),
            }
        )
    return stacked(found)


def block_statistics(trace: Trace) -> dict[tuple[str, int], np.ndarray]:
    """[T, H] each, by statistic and size of blocks: the mean over blocks of |w| times the block's
    largest max(0, x), `max`, or the root of its mean square, `norm`."""
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for w, query, seen in rows(trace):
        x = query @ seen.T
        r = x.relu()
        for size in SIZES:
            parts = r.split(size, dim=1)
            most = torch.stack([part.amax(1) for part in parts], 1)
            norms = torch.stack([part.square().mean(1).sqrt() for part in parts], 1)
            found.setdefault(("max", size), []).append(w.abs() * most.mean(1))
            found.setdefault(("norm", size), []).append(w.abs() * norms.mean(1))
    return {name: torch.stack(row).double().numpy() for name, row in found.items()}
