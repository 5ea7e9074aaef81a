# SPDX-License-Identifier: Apache-2.0
"""Questions about selections of another step or layer, and about sketches on long contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

import misa

from ..sparse import rounded
from .answers import FAR, RECALL, Answers, Question, X
from .routing import dsa, of_runs
from .trace import Trace, best_of, missing, scores_of, select, shares

LAGS = (1, 2, 4, 8, 16)
POOLS = (1, 2, 4, 8)
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
CANDIDATES = (1, 1.5, 2, 3, 4, 6, 8)


def last(trace: Trace, count: int) -> np.ndarray:
    """The last positions [T, count] that each row sees, -1 before the first."""
    return np.maximum(trace.seen[:, None] - 1 - np.arange(count), -1)


def kept(
    answers: Answers, trace: Trace, series: str, x: X, wanted: np.ndarray, found: np.ndarray
) -> None:
    """Also of the wanted positions that are not among the last ones."""
    answers.kept(trace, series, x, wanted, found)
    far = missing(wanted, last(trace, wanted.shape[1]))
    answers.add(FAR, trace, series, x, shares(far, found))


def previous(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for whole in traces:
        trace = of_runs(whole, answers)
        if trace is None:
            continue
        wanted, ends, scores = dsa(trace, top_k), trace.ke.numpy(), scores_of(trace)
        for m in (1, 2, 4):
            own = dsa(trace, m * top_k)
            for lag in LAGS:
                found = np.full((len(own), m * top_k + lag), -1)
                new = last(trace, lag)
                for t in range(lag, len(own)):
                    if ends[t] == ends[t - lag] + lag and trace.ks[t] == trace.ks[t - lag]:
                        found[t] = np.concatenate([own[t - lag], new[t]])
                known = (found >= 0).any(1)
                asked = np.where(known[:, None], wanted, -1)
                label = "k" if m == 1 else f"{m} k"
                best = best_of(found, scores, top_k)
                kept(answers, trace, f"the best {label} of the earlier step", lag, asked, best)
                if m > 1:  # the last k are all near ones
                    near = best_of(last(trace, m * top_k), scores, top_k)
                    kept(answers, trace, f"the last {label} positions", lag, asked, near)


def layers(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    long = [t.rows(t.seen > 2 * max(POOLS) * top_k) for t in traces]
    for trace in long:
        if len(trace.q) == 0:
            answers.notes.append(f"{trace.name}: no row sees {2 * max(POOLS) * top_k} keys")
            continue
        others = [
            other
            for other in long
            if other.name != trace.name
            and other.source == trace.source != ""
            and torch.equal(other.ks, trace.ks)
            and torch.equal(other.ke, trace.ke)
        ]
        if not others:
            answers.notes.append(f"{trace.name}: no other trace names the same source")
            continue
        wanted, scores = dsa(trace, top_k), scores_of(trace)
        for m in POOLS:
            pools = {f"the best of {other.name}": dsa(other, m * top_k) for other in others}
            pools["the last positions"] = last(trace, m * top_k)
            for label, pool in pools.items():
                kept(answers, trace, label, m, wanted, best_of(pool, scores, top_k))


def quantised(trace: Trace) -> Trace:
    """The trace with queries and keys of e4m3."""
    (q, q_scale), (k, k_scale) = rounded(trace.q.float()), rounded(trace.keys)
    if trace.k_scale is not None:
        k, k_scale = trace.k, trace.k_scale
    return replace(trace, q=q, w=trace.w * q_scale, k=k, k_scale=k_scale)


def shortened(trace: Trace, length: int) -> Trace:
    """Rows that see their last `length` keys only."""
    return replace(trace, ks=torch.maximum(trace.ks, trace.ke - length))


def sketches(traces: Sequence[Trace], answers: Answers, top_k: int, scaled: bool) -> None:
    for whole in traces:
        longest = int(whole.seen.max())
        trace = quantised(whole.rows(whole.seen >= 0.9 * longest))
        lengths = [n for n in LENGTHS if n <= 1.05 * longest]
        for length in lengths:
            short = shortened(trace, length)
            k = top_k * length // lengths[-1] if scaled else top_k
            wanted = dsa(short, k)
            for bits in (0, 4, 2):
                for times in CANDIDATES:
                    m = int(times * k)
                    if m >= length:
                        continue
                    config = misa.Config("misa-r", heads=3, top_k=k, candidates=m, sketch=bits)
                    found = shares(wanted, select(short, config))
                    measure = f"{bits} bits" if bits else "e4m3 keys"
                    answers.add(measure, short, f"{length // 1024}K", f"{times:g}", found)


QUESTIONS = [
    Question(
        "previous",
        "Can a step use the selection of an earlier one?",
        "The best k, 2 k or 4 k positions of a row some steps before, and the positions since; of "
        "these the k that the row itself scores highest. Beside it the last 2 k "
        "and 4 k positions in the same way. Only rows that follow one another can be asked.",
        "steps since",
        "the last 4 k positions",
        1,
        previous,
    ),
    Question(
        "layers",
        "Can a layer use the selection of another layer?",
        "The best positions of another trace of the same text (the same `source` in its metadata, "
        "the same rows); of these the k that the row itself scores highest. Beside it the last "
        "positions.",
        "pool, multiples of k",
        "the last positions",
        4,
        layers,
    ),
    Question(
        "sketch",
        "What does a sketch lose as contexts grow, for one k?",
        f"MISA-R 3 + 1 with a re-rank of m positions: {RECALL}, with the same k at every length. "
        "Rows see their last positions only, 2K to all; the same rows at all lengths, those that "
        "see nine tenths of the longest. First scores from the keys themselves (e4m3), or from a "
        "sketch of 4 or 2 bits.",
        "re-ranked, m / k",
        "2K",
        "4",
        lambda traces, top_k, answers: sketches(traces, answers, top_k, scaled=False),
    ),
    Question(
        "sketch-scaled",
        "And if k grows with the context?",
        "As before, with k a fixed part of the length.",
        "re-ranked, m / k",
        "2K",
        "4",
        lambda traces, top_k, answers: sketches(traces, answers, top_k, scaled=True),
    ),
]  # fmt: skip
