# SPDX-License-Identifier: Apache-2.0
"""The command misa-evaluate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TOKENS = 32768
_INDEXERS = "misa,hisa,misa-r,misa-r:h=3:m=2k"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="misa-evaluate",
        description="What other indexers cost on a DeepSeek-V3.2 or GLM-5 model: KL, agreement and "
        "loss against the model's own indexers, and recall, attention and time of every layer.",
        epilog="Example: misa-evaluate deepseek-ai/DeepSeek-V3.2-Exp book.txt code.txt "
        "--indexers misa-r:h=3:m=2k. A rerun of an interrupted command goes on where it was.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the hub")
    parser.add_argument("texts", metavar="TEXT", nargs="+", type=Path, help="files, a text each")
    parser.add_argument(
        "--indexers",
        metavar="NAMES",
        default=_INDEXERS,
        help="separated by commas, in the notation of misa compare (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=_TOKENS,
        help="of each text, from its beginning; the rest is left out (default: %(default)s)",
    )
    parser.add_argument("--chunk", metavar="N", type=int, default=256, help="tokens a forward pass")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("evaluation.json"),
        help="with a page beside it, FILE.html in place of FILE.json (default: %(default)s)",
    )
    parser.add_argument("--backend", default="auto", help="of the indexers (default: %(default)s)")
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        default="auto",
        help="where the weights go, as in transformers: auto, cpu, cuda:0 (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the model's)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from . import _evaluate
        from . import transformers as integration
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'misa[transformers]' has what it needs") from None
    # What can be wrong is found before the weights are loaded, which may take long.
    if options.tokens < 1:
        raise ValueError(f"--tokens: expected 1 or more, got {options.tokens}")
    _evaluate.checked_path(options.output)
    config = AutoConfig.from_pretrained(options.model)
    top_k = getattr(config, "index_topk", None)
    if top_k is None:
        raise ValueError(
            f"MODEL: expected one with indexers, as DeepSeek-V3.2 or GLM-5, got {options.model}, "
            f"a {config.model_type}"
        )
    indexers = options.indexers.split(",")
    for each in indexers:
        try:
            _evaluate.parse(each, top_k)
        except ValueError as error:
            raise ValueError(f"--indexers: {error}") from None
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = []
    for path in options.texts:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: expected text in UTF-8, got other bytes") from None
        every = tokenizer(text)["input_ids"]
        ids = every[: options.tokens]
        if len(ids) < len(every):
            print(
                f"misa-evaluate: {path}: the first {len(ids):,} of {len(every):,} tokens; --tokens "
                "takes more",
                file=sys.stderr,
            )
        if len(ids) < top_k + 2:
            raise ValueError(
                f"{path}: expected {top_k + 2} tokens or more, for up to index_topk = {top_k} keys "
                f"every indexer selects all, got {len(ids)}"
            )
        texts.append(ids)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, device_map=options.device_map
    )
    return integration.evaluate(
        model,
        texts,
        indexers,
        path=options.output,
        chunk=options.chunk,
        backend=options.backend,
        progress=not options.quiet,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a sentence for each indexer. Returns 0, or 2 after a message on stderr."""
    options = _arguments(arguments)
    try:
        result = _run(options)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        print(f"misa-evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("misa-evaluate: interrupted; the same command goes on", file=sys.stderr)
        return 130
    from ._evaluate_page import busy

    if warning := busy(result):
        print(f"misa-evaluate: {warning}", file=sys.stderr)
    for each in result["indexers"]:
        print(each["verdict"])
    print(f"{options.output}, {options.output.with_suffix('.html')}")
    return 0
