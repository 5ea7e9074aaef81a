# SPDX-License-Identifier: Apache-2.0
"""Questions about which heads a router should choose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

import misa

from .answers import Answers, Question
from .trace import BLOCK, Trace, blocks, largest, of_blocks, select, select_given
from .values import SIZES, block_statistics, of_means, of_sample, over_keys

HEADS = (2, 4, 8, 16, 32)
GAMMA = 0.1  # of the package's router "nonlinearity"
WITH, WITHOUT = "with a residual row", "without a residual row"


def dsa(trace: Trace, top_k: int) -> np.ndarray:
    return select(trace, misa.Config("dsa", top_k=top_k))


def fewer(trace: Trace) -> list[int]:
    """The numbers of routed heads that are asked about: at most half of them."""
    return [h for h in HEADS if 2 * h <= trace.heads]


def nonlinearity(trace: Trace, gamma: float = GAMMA) -> np.ndarray:
    """The values [T, H] of MISA-R's router."""
    parts = of_sample(trace)
    return parts["rest"] + gamma * parts["chance"]


def by_router(indexer: str, router: str, h: int, top_k: int, **settings: Any) -> misa.Config:
    return misa.Config(indexer, router=router, heads=h, top_k=top_k, **settings)


FORMS = {WITHOUT: "misa", WITH: "misa-r"}


def criteria(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    exact = {"energy, all keys": "energy", "dispersion, all keys": "dispersion",
             "nonlinearity, all keys": "nonlinearity"}  # fmt: skip
    routers = {"energy of block means (pooled)": "pooled", "dispersion, 128 keys": "dispersion",
               "nonlinearity, 128 keys": "nonlinearity"}  # fmt: skip
    for trace in traces:
        wanted, values = dsa(trace, top_k), over_keys(trace)
        for h in fewer(trace):
            for form, indexer in FORMS.items():
                for label, router in routers.items():
                    found = select(trace, by_router(indexer, router, h, top_k))
                    answers.kept(trace, label, h, wanted, found, form)
                for label, name in exact.items():
                    lists = largest(values[name], h)
                    found = select_given(trace, lists, indexer, top_k=top_k)
                    answers.kept(trace, label, h, wanted, found, form)


def static(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    asked = [
        ("energy", "pooled", WITHOUT),
        ("dispersion", "dispersion", WITHOUT),
        ("nonlinearity", "nonlinearity", WITH),
    ]
    for whole in traces:
        numbers = blocks(whole)
        first = numbers <= numbers[-1] // 2
        if first.all():
            answers.notes.append(f"{whole.name}: one block of rows, so that none is left to ask")
            continue
        calibrated = over_keys(whole.rows(first))
        rest = whole.rows(~first)
        wanted = dsa(rest, top_k)
        for h in fewer(rest):
            for name, router, form in asked:
                of = f"{name}, {form}"
                found = select(rest, by_router(FORMS[form], router, h, top_k))
                answers.kept(rest, "each query its own heads", h, wanted, found, of)
                lists = largest(calibrated[name].mean(0)[None], h) * len(rest.q)
                found = select_given(rest, lists, FORMS[form], top_k=top_k)
                answers.kept(rest, "one list", h, wanted, found, of)


def self_score(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for trace in traces:
        wanted = dsa(trace, top_k)
        for h in fewer(trace):
            for label, router in {"pooled": "pooled", "self-score": "self"}.items():
                found = select(trace, by_router("misa", router, h, top_k))
                answers.kept(trace, label, h, wanted, found, "without a re-rank")
                config = by_router("misa-dagger", router, h, top_k, candidates=4 * top_k)
                answers.kept(trace, label, h, wanted, select(trace, config), "m = 4 k")


def statistics(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for trace in traces:
        wanted, by_block = dsa(trace, top_k), block_statistics(trace)
        for size in SIZES:
            found = select(trace, misa.Config("misa", top_k=top_k, block=size))
            answers.kept(trace, "mean of the block's keys (pooled)", size, wanted, found)
            lists = {
                "largest product in the block": by_block["max", size],
                "norm of the block's products": by_block["norm", size],
                "deviation over block means": of_means(trace, size)["deviation"],
            }
            for label, values in lists.items():
                found = select_given(trace, largest(values, 8), "misa", top_k=top_k)
                answers.kept(trace, label, size, wanted, found)


def signs(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for trace in traces:
        wanted, own = dsa(trace, top_k), over_keys(trace)["self"]
        signed = of_means(trace, 1024)["signed"]
        for h in fewer(trace):
            for of, router, label in (("block means", "pooled", "absolute"),
                                      ("self-score", "self", "signed")):  # fmt: skip
                found = select(trace, by_router("misa", router, h, top_k))
                answers.kept(trace, label, h, wanted, found, of)
            for of, values, label in (("block means", signed, "signed"),
                                      ("self-score", own, "absolute")):  # fmt: skip
                found = select_given(trace, largest(values, h), "misa", top_k=top_k)
                answers.kept(trace, label, h, wanted, found, of)


def runs(trace: Trace) -> list[np.ndarray]:
    """The rows of each stretch of 8 rows whose positions follow one another by one."""
    follows = [
        after[0] == before[0] and after[1] == before[1] + 1
        for before, after in pairwise(zip(trace.ks.tolist(), trace.ke.tolist(), strict=True))
    ]
    found, start = [], 0
    for t in range(1, len(trace.q) + 1):
        if t == len(trace.q) or not follows[t - 1]:
            found += [np.arange(i, i + BLOCK) for i in range(start, t - BLOCK + 1, BLOCK)]
            start = t
    return found


def of_runs(trace: Trace, answers: Answers) -> Trace | None:
    """The trace of the rows of `runs`; None, and a note, if there are none."""
    found = runs(trace)
    if not found:
        answers.notes.append(f"{trace.name}: no {BLOCK} rows that follow one another")
        return None
    chosen = np.zeros(len(trace.q), bool)
    chosen[np.concatenate(found)] = True
    return trace.rows(chosen)


def shared(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for whole in traces:
        trace = of_runs(whole, answers)
        if trace is None:
            continue
        wanted = dsa(trace, top_k)
        asked = {
            "MISA-R 7 + 1": ("misa-r", 7, nonlinearity(trace)),
            "MISA 8": ("misa", 8, of_means(trace, 1024)["pooled"]),
        }
        for of, (indexer, h, values) in asked.items():
            for rows in (1, 2, 4, 8):
                groups = values.reshape(-1, rows, trace.heads)
                choices = {
                    "each row its own heads": values,
                    "of the largest sums": np.repeat(groups.sum(1), rows, 0),
                    "of the first row": np.repeat(groups[:, 0], rows, 0),
                }
                for label, chosen in choices.items():
                    found = select_given(trace, largest(chosen, h), indexer, top_k=top_k)
                    answers.kept(trace, label, rows, wanted, found, of)


def smallest(values: np.ndarray, share: float) -> list[np.ndarray]:
    """Of values [T, H] each row's fewest heads, at least one, whose values add up to `share` of the
    row's sum."""
    order = np.argsort(-values, axis=1, kind="stable")
    total = np.cumsum(np.take_along_axis(values, order, 1), 1)
    counts = 1 + (total < share * total[:, -1:]).sum(1)
    return [heads[:h] for heads, h in zip(order, counts, strict=True)]


def spending(values: np.ndarray, numbers: np.ndarray, h: float) -> list[np.ndarray]:
    """The lists of `smallest` for the share at which the mean h over blocks is nearest to h."""
    low, high = 0.0, 1.0

    def mean(lists: list[np.ndarray]) -> float:
        return float(of_blocks(np.array([len(x) for x in lists], float), numbers).mean())

    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(smallest(values, middle)) < h else (low, middle)
    return min(
        (smallest(values, share) for share in (low, high)), key=lambda lists: abs(mean(lists) - h)
    )


def adaptive(traces: Sequence[Trace], top_k: int, answers: Answers) -> None:
    for trace in traces:
        wanted, numbers = dsa(trace, top_k), blocks(trace)
        asked = {
            WITHOUT: ("pooled", of_means(trace, 1024)["pooled"]),
            WITH: ("nonlinearity", nonlinearity(trace)),
        }
        for h in fewer(trace):
            for form, (router, values) in asked.items():
                found = select(trace, by_router(FORMS[form], router, h, top_k))
                answers.kept(trace, "the same h for every query", h, wanted, found, form)
                lists = spending(values, numbers, h)
                found = select_given(trace, lists, FORMS[form], top_k=top_k)
                answers.kept(trace, "h by share of the values", h, wanted, found, form)


QUESTIONS = [
    Question(
        "criteria",
        "Energy, dispersion or nonlinearity?",
        "The h heads of largest mean, of largest standard deviation over keys, or of largest "
        "distance from a straight line, of |w max(0, q·k)|, over all keys that a row sees or as "
        "the package's routers estimate them; with and without MISA-R's residual row in place of "
        "the other heads. Without a re-rank.",
        "heads routed, h",
        "energy of block means (pooled)",
        8,
        criteria,
    ),
    Question(
        "static",
        "One calibrated list of heads, or routing for each query?",
        "A list of heads for the layer, those of largest mean value over the earlier half of the "
        "rows, is used on the later half, beside routing each query by the package's routers "
        "(energy: of block means). Both halves are of one text, so that the list is calibrated on "
        "text of the same kind.",
        "heads routed, h",
        "each query its own heads",
        8,
        static,
    ),
    Question(
        "self",
        "Self-score or block means?",
        "Heads by w·max(0, q·k) of the row's last position, or by block means of 1024 positions; "
        "without a re-rank, and with one of m = 4 k positions.",
        "heads routed, h",
        "pooled",
        8,
        self_score,
    ),
    Question(
        "blocks",
        "Which statistic of a block, and which size?",
        "Eight heads, without a residual row. The mean of a block's keys is the package's pooled "
        "router. Largest product and norm are of all products in the block, which a router could "
        "not afford. The deviation is the standard deviation over blocks of |w max(0, q·μ)|, which "
        "costs what the pooled router costs.",
        "positions of a block, B",
        "mean of the block's keys (pooled)",
        1024,
        statistics,
    ),
    Question(
        "signs",
        "Signed or absolute values?",
        "Head weights may be negative. Heads of largest |w max(0, x)| or of largest w max(0, x), "
        "from block means of 1024 positions or from the row's last position.",
        "heads routed, h",
        "absolute",
        8,
        signs,
    ),
    Question(
        "shared",
        "May neighbouring queries share their routing?",
        "Rows that follow one another share a list of heads, of the largest sums of the rows' "
        "values or of the first row's values. The residual row remains each row's own.",
        "rows that share, r",
        "each row its own heads",
        4,
        shared,
    ),
    Question(
        "adaptive",
        "Should h depend on the query?",
        "Each row routes the fewest heads whose values add up to a share of the sum of all, the "
        "one at which the trace's rows route h heads on average. Beside it the same h "
        "for every row. Without the residual row values are those of the pooled router, with it "
        "those of nonlinearity.",
        "heads routed on average, h",
        "the same h for every query",
        8,
        adaptive,
    ),
]  # fmt: skip
