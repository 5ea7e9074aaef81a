# SPDX-License-Identifier: Apache-2.0
"""Asks the traces of indexers which router, row, pool and sketch keeps what DSA selects.

    python -m lab.questions TRACE... --out FOLDER [--only NAME...] [--top-k 512] [--page FILE]

Traces are files as `misa compare` reads them. FOLDER gets NAME.json and NAME.svg for each question;
a page of all answers in FOLDER is written with --page. Only rows that see more than top_k keys are
asked. Some questions need rows that follow one another, or several traces of one text; where a
trace lacks them, the answer says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import figure, page, rare, reuse, routing
from .answers import Answers, Question
from .trace import Trace, description, dump, load

QUESTIONS = {q.name: q for q in [*routing.QUESTIONS, *rare.QUESTIONS, *reuse.QUESTIONS]}


def answered(question: Question, traces: Sequence[Trace], top_k: int) -> dict[str, Any]:
    """What is written as JSON: by measure, trace and series lists of x, mean, low and high, and of
    the difference from the series `against` mean, low and high."""
    answers = Answers()
    question.ask(traces, top_k, answers)
    xs = dict.fromkeys(x for by_x in answers.values.values() for x in by_x)
    return {
        "name": question.name,
        "title": question.title,
        "method": question.method,
        "x_label": question.x_label,
        "xs": list(xs),
        "against": question.against,
        "at": question.at,
        "top_k": top_k,
        "traces": [description(trace) for trace in traces],
        "notes": answers.notes,
        "measures": answers.measures(question.against),
    }


def run(
    traces: Sequence[Trace],
    names: Sequence[str],
    top_k: int,
    folder: Path,
    say: Callable[[str], None] = print,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.monotonic()
        answer = answered(QUESTIONS[name], traces, top_k)
        dump(folder / f"{name}.json", answer)
        if answer["measures"]:
            figure.write(answer, folder / f"{name}.svg")
        say(f"{name}: {time.monotonic() - start:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.questions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, metavar="NAME",
                        help=", ".join(QUESTIONS))  # fmt: skip
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--page", type=Path, metavar="FILE", help="of all answers, Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)  # of many small operations, between which the package uses its own
    traces = []
    for path in options.traces:
        try:
            trace = load(path)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        trace = trace.rows(trace.seen > options.top_k)
        if len(trace.q) == 0:
            parser.error(f"{path}: expected rows that see more than {options.top_k} keys")
        if trace.name in (other.name for other in traces):
            parser.error(f"{path}: expected files of different names, got {trace.name} again")
        traces.append(trace)
    run(traces, options.only or list(QUESTIONS), options.top_k, options.out)
    if options.page:
        files = (options.out / f"{name}.json" for name in QUESTIONS)
        found = [json.loads(path.read_text()) for path in files if path.exists()]
        page.write([one for one in found if one["measures"]], options.out, options.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
