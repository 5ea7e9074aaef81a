# SPDX-License-Identifier: Apache-2.0
"""Renders what was measured in folders of lab.distill as a page with figures.

    python -m lab.report FOLDER... --out lab/report.md

Reads the JSON that lab.quality, lab.selection, lab.language and lab.retrieval left in the folders,
and writes the page, and its figures into the folder `figures` beside it. Every figure of the page
is from the JSON; what the paper and earlier work say is quoted as theirs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import base, claims, plots, sparse
from .claims import CLAIMS, DOCUMENTS, FLOOR, Claim, Measured, Testbed
from .indexer import replace

HEAD = f"""# What the lab found

Rendered by `python -m lab.report` from the JSON beside the indexers. The models are small, and
their indexers were made here: DeepSeek's own may behave otherwise. `misa-evaluate` and
`misa compare` answer for a model of yours.

In brackets are 95 % intervals, by bootstrap over documents or prompts. Choices have the notation of
`misa compare`; `:fp8` is on keys and queries rounded to e4m3, `recency` are the last k positions.
`{FLOOR}` is the noise floor: what DSA itself loses to rounding.
"""
ATTENTION = """
Of the dense attention of held-out text, averaged over heads and layers, what k positions keep, in
percent. No selection keeps more than the best positions. Closed: how much of the gap between the
last positions and the best ones the indexer closes.

"""
CEILING = """## What language can tell

Dense attention is the ceiling. Where the last positions alone cost little, a measure cannot tell
selections apart.

"""
PAPERS = """## The paper's scores beside ours

LongBench: the paper's are averages of its tasks with all their prompts, ours means over the prompts
of its English and code tasks that the lab was given.

"""
VERDICTS = f"""## Claims

A claim holds where the whole interval is on its side of the bound, fails where the whole interval
is on the other, and is open where the bound is inside or there are fewer than {DOCUMENTS}
documents. Intervals here are wider than a bootstrap's, by Student's t, as documents are few. A
claim that compares recalls also fails where a layer by itself is below for certain. The paper's
claims are of large models and other contexts: a verdict is of the testbed alone. A claim about
scores is also open where DSA does not score more than the last k positions do: then tasks cannot
tell. The worst layer is chosen by the same data, which makes it look a little worse than it is.

"""
RECALL = """## What is kept of DSA's set

In percent: the recall of DSA's set, the same in the worst layer, and of the attention that DSA's
set keeps the share that is kept. Products are those of a head and a key, or a mean of keys, of all
rows of a prefill. A layer is below where its whole interval is.
"""
LANGUAGE = """## Language, every layer replaced at once

On held-out text, at positions that see more than k keys; and LongBench's scores, as means over
prompts and of each task.
"""
RETRIEVAL = """## Retrieval

Facts at known positions: needles by themselves (`needle`), many at once (`needles`), lines of a
list (`list`), and LongBench's questions whose answers stand in the prompt. Exact: of the answers,
with every layer replaced. Selected: with dense attention, in what part of the layers the set holds
the answer's position, as a mean over questions; where looked: only in layers that give the fact a
tenth of their attention or more. In percent; where no two questions are of a document, intervals
of shares are Wilson's.
"""
DEFAULTS = f"""The choices that keep what `{FLOOR}` keeps: of DSA's set the whole interval of the
difference is not below a tenth of a point, and no layer by itself is below for certain; and the
next token's distribution, where it was measured, is no farther from DSA's than the upper end of its
interval. Of those, the one with the fewest products of a head and a key over a whole prefill, and
the one that reads the fewest bytes of keys, which count in decode, as a share of those of e4m3.
Where no other choice passes, it is DSA.

"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(found: Sequence[float], unit: float = 100, digits: int = 1, sign: str = "") -> str:
    """A mean and its interval."""
    mean, low, high = (f"{unit * x:{sign}.{digits}f}" for x in found)
    return f"{mean} [{low}, {high}]"


def share(x: float) -> str:
    return f"{100 * x:.0f} %"


def strength(testbeds: list[Testbed]) -> str:
    rows = []
    for each in testbeds:
        settings, log = each.state["settings"], each.state.get("log", [])
        steps = f"{each.state['step']} of {settings['steps']}"
        kl = f"{log[-1]['kl']:.3f}" if log else ""
        rows.append([each.name, each.base, str(each.heads), steps, kl])
    text = "## How far the testbeds carry\n\n"
    text += table(["testbed", "model", "heads", "steps trained", "last KL"], rows)
    rows = [
        [
            each.name,
            claims.where({**one, "top_k": entry["top_k"]}),
            str(len(set(one["documents"]))),
            *(shown(entry[choice]) for choice in plots.CHOICES),
            shown(entry["over_recent"], sign="+"),
            share(claims.closed(entry)),
        ]
        for each in testbeds
        for one in each.found["quality"]
        for entry in one["means"]
    ]
    if rows:
        text += ATTENTION
        choices = ["best", "indexer", "last positions", "random"]
        gained = ["indexer over last, points", "closed"]
        text += table(["testbed", "context", "documents", *choices, *gained], rows)
    text += "\n"
    for each in testbeds:
        if note := each.state.get("note"):
            text += f"- {each.name}: {note}.\n"
        weak: dict[str, list[str]] = {}
        for length, top_k in claims.contexts(each):
            place = claims.where({"length": length, "top_k": top_k})
            weak.setdefault(claims.weakness(each, length, top_k), []).append(place)
        for why, places in weak.items():
            at = "; ".join(places)
            if why:
                text += f"- **{each.name} counts as weak at {at}: {why}.** It supports no claim.\n"
            else:
                text += f"- {each.name} supports claims at {at}.\n"
        beyond = sorted({n for n, _ in claims.contexts(each) if n > base.NATIVE})
        if beyond and each.base == base.SMOLLM2:
            text += (
                f"- {each.name}: at {', '.join(f'{n:,}' for n in beyond)} tokens positions are "
                "rescaled, for which the model was not trained.\n"
            )
        if each.stale:
            text += (
                f"- {each.name}: left out, for they were measured after other steps: "
                f"{', '.join(f'`{name}`' for name in each.stale)}.\n"
            )
    return text


def ceiling(testbeds: list[Testbed]) -> str:
    """What language can tell: dense attention as the ceiling, the last positions as the ground."""
    rows = []
    for each in testbeds:
        for one in each.found["language"]:
            for part, name, digits in (("text", "loss", 4), ("prompts", "score", 2)):
                of = claims.by_label(one[part])
                if not {"dense", "dsa"} <= of.keys():
                    continue
                unit = 1 if name == "loss" else 100
                over = f"{name}_over_dsa"
                rows.append(
                    [
                        each.name,
                        claims.where(one),
                        "loss, nats" if name == "loss" else "LongBench's score",
                        *(
                            shown(of[label][name], unit, digits) if label in of else ""
                            for label in ("dense", "dsa")
                        ),
                        *(
                            shown(of[label][over], unit, digits, "+") if label in of else ""
                            for label in ("dense", FLOOR, "recency")
                        ),
                    ]
                )
    text = ""
    if rows:
        head = ["testbed", "context", "measure", "dense", "DSA"]
        head += [f"{name} less DSA" for name in ("dense", f"`{FLOOR}`", "`recency`")]
        text += table(head, rows)
    labels = ("dense", "dsa", FLOOR, "recency")
    rows = []
    for each in testbeds:
        for one in each.found["retrieval"]:
            by_kind: dict[str, dict[str, str]] = {}
            for of in one["results"]:
                if "answers" in of:
                    exact = shown(of["answers"]["exact"])
                    by_kind.setdefault(of["kind"], {})[of["label"]] = exact
            for kind, exact_by in by_kind.items():
                cells = [exact_by.get(label, "") for label in labels]
                rows.append([each.name, claims.where(one), kind, *cells])
    if rows:
        head = ["testbed", "context", "exact answers, %", *(f"`{label}`" for label in labels)]
        text += ("\n" if text else "") + table(head, rows)
    return CEILING + text if text else ""


def papers(testbeds: list[Testbed]) -> str:
    """LongBench's averages, the paper's and ours."""
    labels = ("dsa", "misa:h=8", "hisa")
    rows = [
        [f"{model} ({claims.PAPER})", "", *(f"{of[label]:.2f}" for label in labels)]
        for model, of in claims.PAPER_SCORES.items()
    ]
    for each in testbeds:
        for one in each.found["language"]:
            found = {x["label"].split(":blocks")[0]: x for x in one["prompts"]}
            if any(label in found for label in labels):
                cells = [
                    shown(found[label]["score"], digits=2) if label in found else ""
                    for label in labels
                ]
                rows.append([f"{each.name} ({each.base})", claims.where(one), *cells])
    head = ["model", "context", *(f"`{label}`" for label in labels)]
    return PAPERS + table(head, rows)


def compared(claim: Claim, one: Measured) -> str:
    unit, name = claim.unit
    sign = "+" if name == "points" else ""
    return f"{shown(one.found, unit, 2, sign)} {name}, bound {unit * one.bound:g}"


def verdicts(testbeds: list[Testbed]) -> str:
    rows: list[list[str]] = []
    groups: dict[str, list[tuple[Claim, str]]] = {"holds": [], "fails": [], "open": []}
    for claim in CLAIMS:
        about = [claim.text, claim.said]
        for each in testbeds:
            for one in claim.measure(each):
                place = f"{each.name}, {one.where}"
                weak = claims.weakness(each, one.one["length"], one.one["top_k"])
                verdict = one.verdict + (", and the testbed is weak" if weak else "")
                rows.append([*about, place, compared(claim, one), str(one.documents), verdict])
                about = ["", ""]  # said once
                if not weak:
                    groups[one.verdict].append((claim, f"{place}: {compared(claim, one)}"))
        if about[0]:
            rows.append([*about, "", "", "", "not measured"])
    text = VERDICTS
    text += table(["claim", "whose", "where", "measured", "documents", "verdict"], rows)
    titles = {"holds": "What holds", "fails": "What does not", "open": "What is open"}
    for verdict, title in titles.items():
        text += f"\n### {title}\n\n"
        lines: dict[str, list[str]] = {}
        for claim, found in groups[verdict]:
            lines.setdefault(claim.text, []).append(found)
        for claim_text, places in lines.items():
            text += f"- {claim_text[0].upper()}{claim_text[1:]}: {'; '.join(places)}.\n"
        if not lines:
            text += "Nothing, on testbeds that are not weak.\n"
    return text


def recall(testbeds: list[Testbed]) -> str:
    text = ""
    for each in testbeds:
        for one in each.found["selection"]:
            rows = []
            for of in one["results"]:
                least = claims.worst(of)
                under = [x for x in of["layers"] if x["recall"][2] < claims.EVERY_LAYER]
                chosen = sparse.choice(of["label"], one["top_k"])
                rows.append(
                    [
                        f"`{of['label']}`",
                        share(claims.products(chosen, each.heads, one["length"])),
                        shown(of["recall"]),
                        f"{shown(least['recall'])} (layer {least['layer']})",
                        f"{len(under)} of {len(of['layers'])}",
                        shown(of["attention"]),
                    ]
                )
            text += f"\n### {each.name}, {claims.where(one)}\n\n"
            text += f"Rows that see {one.get('least', one['top_k'] + 1):,} keys or more.\n\n"
            below = f"layers below {share(claims.EVERY_LAYER)}"
            head = ["choice", "products of DSA's", "recall", "worst layer", below, "attention"]
            text += table(head, rows) + mended(each, one)
    return RECALL + text if text else ""


def mended(testbed: Testbed, one: dict[str, Any]) -> str:
    """Where the paper's 8 heads fail, and the cheapest choices that do not."""
    results = claims.by_label(one["results"])
    if "misa:h=8" not in results:
        return ""
    lost = [
        str(x["layer"])
        for x in results["misa:h=8"]["layers"]
        if x["recall"][2] < claims.EVERY_LAYER
    ]
    if not lost:
        return ""
    kept = []
    for label, of in results.items():
        chosen = sparse.choice(label, one["top_k"])
        cost = claims.products(chosen, testbed.heads, one["length"])
        if chosen.config and cost < 1 and claims.worst(of)["recall"][1] >= claims.EVERY_LAYER:
            kept.append((cost, label, chosen.config.candidates > 0))
    cheapest = {}
    for name, ranked in (("without a re-rank", False), ("with one", True)):
        labels = [label for _, label, ranks in sorted(kept) if ranks == ranked]
        cheapest[name] = f"`{labels[0]}`" if labels else "none that was measured"
    text = f"\n`misa:h=8` is below {share(claims.EVERY_LAYER)} in the layers {', '.join(lost)}. "
    found = "; ".join(f"{name} {label}" for name, label in cheapest.items())
    return text + f"The cheapest choice that is not, in any layer: {found}.\n"


def language(testbeds: list[Testbed]) -> str:
    text = ""
    for each in testbeds:
        for one in each.found["language"]:
            text += f"\n### {each.name}, {claims.where(one)}\n\n"
            text += table(
                ["choice", "windows", "documents", "loss less DSA", "KL from DSA", "same top 1, %"],
                [
                    [
                        f"`{x['label']}`",
                        str(x["windows"]),
                        str(x["documents"]),
                        shown(x["loss_over_dsa"], 1, 4, "+"),
                        shown(x["kl"], 1, 5),
                        shown(x["top1"]),
                    ]
                    for x in one["text"]
                ],
            )
            if not one["prompts"]:
                continue
            tasks = list(dict.fromkeys(task for x in one["prompts"] for task in x["tasks"]))
            text += "\n" + table(
                ["choice", "prompts", "score", "less DSA", *tasks],
                [
                    [
                        f"`{x['label']}`",
                        str(x["prompts"]),
                        shown(x["score"], digits=2),
                        shown(x["score_over_dsa"], digits=2, sign="+"),
                        *(
                            f"{100 * x['tasks'][task]['score']:.1f}" if task in x["tasks"] else ""
                            for task in tasks
                        ),
                    ]
                    for x in one["prompts"]
                ],
            )
    return LANGUAGE + text if text else ""


def retrieval(testbeds: list[Testbed]) -> str:
    text = ""
    for each in testbeds:
        for one in each.found["retrieval"]:
            rows = []
            for of in one["results"]:
                answers, selection = of.get("answers"), of.get("selection")
                looked = selection and selection["found_where_looked"]
                rows.append(
                    [
                        of["kind"],
                        f"`{of['label']}`",
                        str((answers or selection)["questions"]),
                        shown(answers["exact"]) if answers else "",
                        shown(answers["log_probability"], 1, 2) if answers else "",
                        shown(selection["found"]) if selection else "",
                        shown(looked) if looked else "",
                    ]
                )
            text += f"\n### {each.name}, {claims.where(one)}\n\n"
            head = ["facts", "choice", "questions", "exact", "log-probability"]
            text += table([*head, "selected", "where looked"], rows)
    return RETRIEVAL + text if text else ""


def defaults(testbeds: list[Testbed]) -> str:
    text = "## A default by shape and length\n\n"
    found = claims.defaults(testbeds)
    if not found:
        return text + (
            "None: no testbed that is not weak was measured on enough documents "
            f"({DOCUMENTS} or more).\n"
        )
    text += DEFAULTS
    rows = []
    for one in found:
        files = [
            file
            for each in testbeds
            if each.name in one.testbeds
            for file in each.found["selection"]
            if (file["length"], file["top_k"]) == (one.length, one.top_k)
        ]
        cells = []
        for label, cost in ((one.products, claims.products), (one.bytes, claims.key_bytes)):
            chosen = sparse.choice(label, one.top_k)
            args = (one.heads, one.length) if cost is claims.products else (one.length,)
            over = [claims.recall_over(file, label, FLOOR) for file in files]
            kept = "; ".join(shown(x, sign="+", digits=2) for x in over if x is not None)
            cells += [f"`{label}`", share(cost(chosen, *args)), kept]
        keeps = {True: "keeps it", False: "does not keep it", None: "not measured"}
        rows.append(
            [
                str(one.heads),
                f"{one.length:,}",
                f"{one.top_k:,}",
                ", ".join(one.testbeds),
                str(one.documents),
                *cells,
                f"`{one.auto}`: {keeps[one.auto_keeps]}",
            ]
        )
    over = f"recall over `{FLOOR}`, points"
    head = ["heads", "tokens", "k", "testbeds", "documents", "prefill", "products of DSA's", over]
    head += ["decode", "bytes of DSA's", over, "`auto` today"]
    return text + table(head, rows)


def pictures(testbeds: list[Testbed], folder: Path) -> str:
    """Draws the figures into `folder` beside the page, and shows them."""
    text = ""
    for each in testbeds:
        for name, picture in plots.drawn(each).items():
            path = folder / f"{each.name}-{name}.svg"
            replace(path, lambda beside, picture=picture: beside.write_text(picture))
            caption = plots.FIGURES[name][1]
            text += f"\n![{caption}: {each.name}]({folder.name}/{path.name})\n"
    return f"## Figures\n{text}" if text else ""


def page(testbeds: list[Testbed], figures: Path) -> str:
    parts: list[Any] = [HEAD]
    for part in (strength, ceiling, papers, verdicts, recall, retrieval, language, defaults):
        parts.append(part(testbeds))
    parts.append(pictures(testbeds, figures))
    return "\n".join(part for part in parts if part)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", type=Path, nargs="+", help="of lab.distill")
    parser.add_argument("--out", type=Path, required=True, help="FILE.md")
    options = parser.parse_args()
    for folder in options.folders:
        if not (folder / "state.json").exists():
            parser.error(f"{folder}: expected a folder of lab.distill, with a state.json")
    figures = options.out.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    text = page([claims.testbed(folder) for folder in options.folders], figures)
    replace(options.out, lambda beside: beside.write_text(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
