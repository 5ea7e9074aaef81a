# SPDX-License-Identifier: Apache-2.0
"""Questions about heads that fire on few tokens: those in a trace, and planted ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

import misa

from .answers import RECALL, Answers, Question
from .routing import dsa
from .trace import Trace, largest, missing, scores_of, select, select_given, shares
from .values import of_sample, over_keys

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
RARE = 0.01  # heads that fire on fewer keys are asked about with gamma
GAMMAS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3)
EVERY = 1000  # one token in so many is a planted needle
ALIGNED = (0.25, 0.5)  # cosines between a planted head and its needles


def without(trace: Trace, silent: np.ndarray) -> Trace:
    """The trace in which some heads, a mask [T, H], have weight 0."""
    return replace(trace, w=trace.w.masked_fill(torch.from_numpy(silent), 0))


def rare(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for trace in traces:
        wanted, values = dsa(trace, top_k), over_keys(trace)
        for rate in RATES:
            few = values["fires"] < rate
            x = f"{100 * rate:g} %"
            answers.add("heads that fire on fewer", trace, "of all heads", x, few.mean(1))
            found = dsa(without(trace, few), top_k)
            answers.kept(trace, "DSA without them", x, wanted, found)
            # As many heads for each row, the ones of least dispersion.
            quiet = np.argsort(np.argsort(values["dispersion"], 1), 1) < few.sum(1)[:, None]
            found = dsa(without(trace, quiet), top_k)
            answers.kept(trace, "DSA without as many of least dispersion", x, wanted, found)


def direction(keys: torch.Tensor) -> torch.Tensor | None:
    """float32 [D] of length 1, whose product with every key is negative, and as near to the
    direction in which keys vary least as that allows; None if the keys have no common side."""
    mean = keys.mean(0)
    side = mean / mean.norm()
    beside = keys @ side
    if float(beside.min()) <= 0:
        return None
    least = torch.linalg.eigh((keys - mean).T @ (keys - mean)).eigenvectors[:, 0]
    least = least - (least @ side) * side
    least = least / least.norm()
    slope = 1.01 * float((keys @ least / beside).max()) + 0.01
    found = least - slope * side
    return found / found.norm()


def plant(trace: Trace, aligned: float, top_k: int) -> tuple[Trace, np.ndarray] | None:
    """The trace with a head in place of its quietest one that fires on one token in a thousand,
    and on these so strongly that DSA selects them; and what DSA selects for this head alone, int
    [T, n] with -1.

    aligned: the cosine between the head's queries and the needles' keys. Needles stand on odd
    positions, which are not sampled. None if no head can be planted.
    """
    keys = trace.keys.clone()
    head_query = direction(keys)
    if head_query is None or len(trace.ks.unique()) > 1:
        return None
    start = int(trace.ks[0])
    offsets = np.random.default_rng(0).integers(0, EVERY // 2, len(keys) // EVERY + 1)
    places = np.arange(len(offsets)) * EVERY + 2 * offsets + 1
    needles = start + places[start + places < int(trace.ke.min())]
    if len(needles) == 0:
        return None
    for s in needles:
        along = keys[s] - (keys[s] @ head_query) * head_query
        along = along / along.norm()
        length = keys[s].norm()
        keys[s] = length * (aligned * head_query + (1 - aligned**2) ** 0.5 * along)
    quiet = int(over_keys(trace)["energy"].mean(0).argmin())
    q, w = trace.q.float(), trace.w.clone()
    q[:, quiet] = head_query * q.norm(dim=2).median()
    w[:, quiet] = 0
    planted = replace(trace, q=q.bfloat16(), w=w, k=keys.bfloat16(), k_scale=None)
    scores = scores_of(planted)
    least = scores[:, needles - start].min(1)
    # The least needle comes to stand as far above the k-th score as that is above the median.
    cut = -np.partition(-scores, top_k - 1, axis=1)[:, top_k - 1]
    median = np.array([np.median(row[:n]) for row, n in zip(scores, trace.seen, strict=True)])
    product = (planted.q[:, quiet].float() @ planted.keys[needles].T).amin(1)
    weights = w.clone()
    lift = torch.from_numpy(2 * cut - median - least).clamp_min(0)
    weights[:, quiet] = lift / product
    with_head = replace(planted, w=weights)
    owed = missing(dsa(with_head, top_k), dsa(planted, top_k))
    owed[~np.isin(owed, needles - start)] = -1
    return with_head, owed


def gamma(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for trace in traces:
        wanted = dsa(trace, top_k)
        fires = over_keys(trace)["fires"]
        owed = missing(wanted, dsa(without(trace, fires < RARE), top_k))
        asked = [(trace, RECALL, wanted)]
        asked.append((trace, f"kept of what heads that fire on < {100 * RARE:g} % add", owed))
        for aligned in ALIGNED:
            planted = plant(trace, aligned, top_k)
            if planted is None:
                answers.notes.append(f"{trace.name}: its keys allow no planted head")
                break
            asked.append((planted[0], f"planted needles kept, cosine {aligned:g}", planted[1]))
        for one, measure, positions in asked:
            parts = of_sample(one)
            for factor in GAMMAS:
                values = parts["rest"] + factor * parts["chance"]
                for h, m in ((7, 0), (3, 2)):
                    label = f"MISA-R {h} + 1" + (f", m = {m} k" if m else "")
                    lists, settings = largest(values, h), {"candidates": m * top_k}
                    found = select_given(one, lists, "misa-r", top_k=top_k, **settings)
                    answers.add(measure, one, label, f"{factor:g}", shares(positions, found))
            found = shares(positions, select(one, misa.Config("misa", top_k=top_k)))
            for factor in GAMMAS:
                answers.add(measure, one, "MISA 8", f"{factor:g}", found)


QUESTIONS = [
    Question(
        "rare",
        "Do trained indexers have heads that fire on few tokens?",
        "For each row, the share of heads whose product is positive on fewer of the keys, and what "
        "remains of DSA's set without these heads; beside it DSA without as many heads of least "
        "dispersion.",
        "keys that a head fires on",
        "DSA without as many of least dispersion",
        "1 %",
        rare,
    ),
    Question(
        "gamma",
        "What must γ be?",
        "MISA-R adds γ·|w|·‖q‖·κ·(1 - p) to a head's value, so that heads that fire on no sampled "
        "key may be routed. Asked on the traces as they are: of DSA's set, and of those of its "
        "positions that it would not have without the heads that fire on fewer than one key in a "
        "hundred. And on planted heads: the quietest head of the trace is replaced by one that "
        "fires on one key in a thousand, none of them sampled, so strongly that DSA's scores of "
        "these keys stand as far above the k-th score as that is above the median; its queries and "
        "their keys have a cosine of 0.25 or 0.5. MISA without a "
        "residual row stands beside, and does not depend on γ.",
        "γ",
        "MISA 8",
        "0.1",
        gamma,
    ),
]
