# SPDX-License-Identifier: Apache-2.0
"""The passes of `misa.integrations.transformers.evaluate`, and the file that keeps what is done."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import misa

from . import _evaluate_page as page
from . import transformers as integration
from ._attention import attentions, dense_attention, on_call, spread
from ._evaluate_measures import (
    add,
    attention_on,
    compare_logits,
    mask_of,
    processor_seconds,
    recall,
    summarize,
)

_log = logging.getLogger("misa")
_ATTENTION_ROWS = 16  # of a chunk and layer; few, because each needs the scores of every head


def parse(text: str, top_k: int) -> misa.Config:
    """An indexer in the notation of `misa compare`, such as misa-r:h=3:m=2k."""
    indexer, fields = misa._core.indexer_of_notation(text, top_k)
    return misa.Config(indexer, top_k=top_k, **fields)


def _configs(
    named: dict[str, Any], indexers: Sequence[str | misa.Config], backend: str
) -> list[misa.Config]:
    """DSA, and the indexers; raises for what the model cannot have."""
    _, _, top_k = integration._size(named)
    if isinstance(indexers, (str, misa.Config)) or not indexers:
        raise ValueError(f"indexers: expected a list of one or more, got {indexers!r}")
    configs = [misa.Config("dsa", top_k=top_k)]
    for i, each in enumerate(indexers):
        name = f"indexers[{i}]"
        if not isinstance(each, (str, misa.Config)):
            raise ValueError(f"{name}: expected a name or a misa.Config, got {each!r}")
        try:
            config = parse(each, top_k) if isinstance(each, str) else each
            integration._check(named, config, backend)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if config.top_k != top_k:
            raise ValueError(
                f"{name}.top_k: expected {top_k}, the model's index_topk, got {config.top_k}"
            )
        if config in configs[1:]:
            raise ValueError(f"{name}: expected another than those before it, got {config}")
        configs.append(config)
    return configs


def _tokens(
    texts: Sequence[Any], tokenizer: Callable[..., Any] | None, top_k: int, vocabulary: int
) -> list[torch.Tensor]:
    """int64 [T] of each text; raises for texts of which no position would count."""
    if isinstance(texts, (str, torch.Tensor)) or not len(texts):
        raise ValueError(f"texts: expected a list of one or more, got {texts!r}")
    least = top_k + 2
    result = []
    for i, text in enumerate(texts):
        name = f"texts[{i}]"
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(f"tokenizer: expected one, for {name} is a string, got None")
            text = tokenizer(text)["input_ids"]
        try:
            tokens = torch.as_tensor(text).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"{name}: expected a string or token ids, got {type(text).__name__}"
            ) from None
        if tokens.dim() != 1 or (tokens.dtype.is_floating_point and len(tokens)):
            raise ValueError(
                f"{name}: expected token ids [T], got {tokens.dtype} {list(tokens.shape)}"
            )
        if len(tokens) < least:
            raise ValueError(
                f"{name}: expected {least} tokens or more, for up to index_topk = {top_k} keys "
                f"every indexer selects all, got {len(tokens)}"
            )
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise ValueError(
                f"{name}: expected token ids from 0 to {vocabulary - 1}, got "
                f"{int(tokens.min())} to {int(tokens.max())}"
            )
        result.append(tokens.long())
    return result


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _weights(named: dict[str, Any], head: torch.nn.Module) -> str | None:
    """Tells models of one config apart, from a few weights; None if these are not in memory."""
    parameters = [p for module in (*named.values(), head) for p in module.parameters()]
    if any(parameter.is_meta for parameter in parameters):
        return None
    some = [parameter.detach().reshape(-1)[:64].float().cpu() for parameter in parameters]
    return _digest(torch.cat(some).numpy().tobytes())


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} processors"


def _config_of(config: misa.Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)} | {
        "label": page.label(config)
    }


def checked_path(path: str | Path) -> Path:
    """A path that a _File can have."""
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"path: expected a name that ends with .json, got '{path}'")
    if not path.parent.is_dir():
        raise ValueError(f"path: expected a folder that exists, got '{path.parent}'")
    return path


class _File:
    """What is done, in a JSON file that is replaced as a whole after each pass, if there is one."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else checked_path(path)
        # As it is read back: keys are strings, tuples are lists.
        self.settings = json.loads(json.dumps(settings))
        self.texts: list[dict[str, Any]] = [{} for _ in settings["texts"]]
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text())
            settings, texts = before["settings"], before["sums"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"path: expected a file of evaluate or none, got '{path}'") from None
        for name, mine in self.settings.items():
            theirs = settings.get(name)
            if theirs != mine:
                raise ValueError(
                    f"path: expected {path} to have the settings of this call, got {name} = "
                    f"{_shown(theirs)} there and {_shown(mine)} here; give another path"
                )
        self.texts = texts

    def result(self) -> dict[str, Any]:
        configs = self.settings["indexers"]
        layers, figures = summarize(self.texts, len(configs) - 1, self.settings["shares"])
        waited = [text["waited"] for text in self.texts if "waited" in text]
        running, waiting = (
            (sum(column) for column in zip(*waited, strict=True)) if waited else (0, 0)
        )
        result = {
            "settings": self.settings,
            "complete": all(
                "layers" in text and len(text.get("passes", {})) == len(configs) - 1
                for text in self.texts
            ),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "waited_for_processor": waiting / (running + waiting) if waiting else 0,
            "layers": layers,
            "dsa": figures[0],
            "indexers": [
                {"config": config, **figure}
                for config, figure in zip(configs[1:], figures[1:], strict=True)
            ],
        }
        for each in result["indexers"]:
            each["verdict"] = page.verdict(each)
        result["sums"] = self.texts
        return result

    def save(self) -> dict[str, Any]:
        result = self.result()
        if self.path is not None:
            _replace(self.path, json.dumps(result, indent=1) + "\n")
            _replace(self.path.with_suffix(".html"), page.render(result))
        return result


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else text[:197] + "..."


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _timed(device: torch.device, run: Callable[[], Any]) -> tuple[Any, float]:
    """What the second of two runs returns, and its seconds; the first one plans and warms up.

    On a device the second is enqueued while the first still runs, so that its time has no gaps.
    """
    run()
    if device.type != "cuda":
        start = time.perf_counter()
        return run(), time.perf_counter() - start
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1e3


class _Evaluation:
    """One model with the arguments of `evaluate`."""

    def __init__(
        self,
        model: Any,
        named: dict[str, Any],
        configs: list[misa.Config],
        chunk: int,
        backend: str,
    ) -> None:
        self.model, self.named, self.configs = model, named, configs
        self.chunk, self.backend = chunk, backend
        self.top_k = configs[0].top_k
        self.head = model.get_output_embeddings()
        self.around = attentions(model)
        has_own = {module.layer_idx for module in named.values()}
        #: The layer whose selection a layer without an indexer has.
        self.shares: dict[int, int] = {
            layer: max(each for each in has_own if each < layer)
            for layer in self.around
            if layer not in has_own and min(has_own) < layer
        }
        device = model.device
        self.device = torch.device("cpu") if device.type == "meta" else device

    def _run(
        self, tokens: torch.Tensor, step: Callable[[int, torch.Tensor], None], bar: Any
    ) -> None:
        """Prefills a text in chunks; `step(first position, logits [C, V])` after each."""
        cache = None
        for start in range(0, len(tokens), self.chunk):
            piece = tokens[None, start : start + self.chunk].to(self.device)
            out = self.model(piece, cache=cache, use_cache=True)
            cache = out.cache
            step(start, out.logits[0])
            bar.update()

    def own_pass(
        self, tokens: torch.Tensor, layers: dict[str, Any] | None, bar: Any
    ) -> list[torch.Tensor]:
        """What the head gets in each chunk, in host memory, while the model's own indexers select.

        Adds the sums of every layer to `layers`, unless that is None.
        """
        hidden: list[torch.Tensor] = []
        with ExitStack() as stack:
            handle = self.head.register_forward_pre_hook(
                lambda _, args: hidden.append(args[0][0].cpu())
            )
            stack.callback(handle.remove)
            if layers is not None:
                measured = _LayerSums(self, layers)
                stack.enter_context(integration._recording(self.named, measured.selection))
                for module in self.around.values():
                    stack.callback(on_call(module, measured.attention).remove)
            self._run(tokens, lambda start, logits: None, bar)
        return hidden

    def indexer_pass(
        self, tokens: torch.Tensor, config: misa.Config, hidden: list[torch.Tensor], bar: Any
    ) -> dict[str, Any]:
        """Sums over positions by the power of two below the number of keys that these see."""
        sums: dict[str, Any] = {}

        def step(start: int, logits: torch.Tensor) -> None:
            # Positions that see more than top_k keys and have a next token.
            first = max(self.top_k - start, 0)
            end = min(len(logits), len(tokens) - 1 - start)
            if first >= end:
                return
            own = self.head(hidden[start // self.chunk][None].to(logits.device))[0]
            own = own.to(logits.device)  # spread over devices, the head's is another
            targets = tokens[start + first + 1 : start + end + 1].to(logits.device)
            figures = compare_logits(own[first:end], logits[first:end], targets)
            keys = torch.arange(start + first + 1, start + end + 1, device=logits.device)
            powers = keys.double().log2().floor()
            for power in powers.unique().tolist():
                there = powers == power
                part = {name: float(x[there].sum()) for name, x in figures.items()}
                if not all(map(_finite, part.values())):
                    raise RuntimeError(
                        f"model: expected finite logits, got NaN or infinity between positions "
                        f"{start + first} and {start + end - 1} with {page.label(config)}"
                    )
                part |= {"positions": int(there.sum()), "kl_max": float(figures["kl"][there].max())}
                add(sums.setdefault(str(1 << int(power)), {}), part)

        integration._select_with(self.named, config, self.backend)
        try:
            self._run(tokens, step, bar)
        finally:
            integration.disable(self.model)
        return sums


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


class _LayerSums:
    """Recall, attention and time of every indexer on what the model's own indexers see."""

    def __init__(self, evaluation: _Evaluation, layers: dict[str, Any]) -> None:
        self.evaluation, self.layers = evaluation, layers
        self.turn = 0
        #: Rows of the chunk, and what the last layer's indexer and each of the others select there.
        self.rows: torch.Tensor | None = None
        self.selected: list[torch.Tensor] = []

    def selection(self, module: Any, positions: torch.Tensor, *inputs: Any) -> None:
        evaluation = self.evaluation
        operands = integration._seen(module, *inputs)
        keys, count = len(operands.k), len(operands.q)
        first = max(evaluation.top_k - (keys - count), 0)  # the first row that sees more than top_k
        self.rows, self.selected = None, []
        if first >= count:
            return
        q, w, ks, ke = (x[first:] for x in (operands.q, operands.w, operands.ks, operands.ke))
        own = positions[0, first:]
        mask = mask_of(own, keys)
        some = spread(count - first, _ATTENTION_ROWS).to(own.device)
        configs = list(dict.fromkeys(evaluation.configs))  # DSA may be asked for, and is first
        measured: dict[misa.Config, tuple[float, float, float, torch.Tensor]] = {}
        for i in range(len(configs)):
            config = configs[(i + self.turn) % len(configs)]  # each is the first one in turn
            select = functools.partial(
                misa.select, q, w, operands.k, ks, ke, config=config, backend=evaluation.backend
            )
            got, seconds = _timed(q.device, select)
            shares = recall(mask, got.indices)
            measured[config] = (
                float(shares.sum()), float(shares.min()), seconds, got.indices[some]
            )  # fmt: skip
        self.turn += 1
        total, least, time, selected = zip(*(measured[c] for c in evaluation.configs), strict=True)
        self.rows, self.selected = some + first, [own[some], *selected]
        sums = {
            "rows": count - first,
            "recall": list(total),
            "recall_min": list(least),
            "seconds": list(time),
        }
        add(self.layers.setdefault(str(module.layer_idx), {}), sums)

    def attention(self, module: Any, call: dict[str, Any]) -> None:
        if self.rows is None:
            return
        rows = self.rows.to(call["hidden_states"].device)
        attention = dense_attention(module, 0, rows, call)
        kept = [attention_on(attention, x.to(attention.device)) for x in self.selected]
        sums = {"attention_rows": len(rows), "attention": [float(each.sum()) for each in kept]}
        add(self.layers.setdefault(str(module.layer_idx), {}), sums)


@torch.no_grad()
def evaluate(
    model: Any,
    texts: Sequence[Any],
    indexers: Sequence[str | misa.Config],
    *,
    tokenizer: Callable[..., Any] | None,
    path: str | Path | None,
    chunk: int,
    backend: str,
    progress: bool,
) -> dict[str, Any]:
    """As documented at `misa.integrations.transformers.evaluate`."""
    named = integration._indexers(model)
    if (usage := integration.usage(model)) is not None:
        raise ValueError(
            f"model: expected one with its own indexers, got one enabled with {usage.config}; call "
            "disable first"
        )
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is None or get_head() is None:
        raise ValueError(
            f"model: expected one that gives logits, as ...ForCausalLM, got {type(model).__name__}"
        )
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected 1 or more, got {chunk!r}")
    configs = _configs(named, indexers, backend)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = _tokens(texts, tokenizer, configs[0].top_k, vocabulary)
    evaluation = _Evaluation(model, named, configs, chunk, backend)
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    file = _File(
        path,
        {
            "model": type(model).__name__,
            "name": model.config._name_or_path,
            "model_config": _digest(config.encode()),
            "weights": _weights(named, evaluation.head),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "shares": evaluation.shares,
            "texts": [
                {"tokens": len(each), "sha256": _digest(each.numpy().tobytes())} for each in tokens
            ],
            "indexers": [_config_of(each) for each in configs],
            "top_k": evaluation.top_k,
            "chunk": chunk,
            "backend": backend,
            "machine": _machine(evaluation.device),
            "misa": misa.version(),
            "torch": torch.__version__,
        },
    )
    missing = [
        [i for i in range(1, len(configs)) if str(i) not in text.get("passes", {})]
        for text in file.texts
    ]
    # Without its own indexers' pass a text has no other one to compare with.
    runs = [
        len(m) + 1 if m or "layers" not in t else 0
        for m, t in zip(missing, file.texts, strict=True)
    ]
    total = sum(n * -(-len(each) // chunk) for n, each in zip(runs, tokens, strict=True))
    training = model.training
    model.eval()
    try:
        with tqdm(total=total, unit="chunk", disable=not progress, mininterval=1) as bar:
            for i, each in enumerate(tokens):
                if not runs[i]:
                    continue
                about = f"text {i + 1} of {len(tokens)}"
                text = file.texts[i]
                bar.set_description(f"{about}, own indexers")
                layers: dict[str, Any] | None = None if "layers" in text else {}
                before = processor_seconds()
                hidden = evaluation.own_pass(each, layers, bar)
                if layers is not None:
                    after = processor_seconds()
                    text["layers"] = layers
                    if evaluation.device.type == "cpu":
                        text["waited"] = [max(b - a, 0) for a, b in zip(before, after, strict=True)]
                    file.save()
                for index in missing[i]:
                    label = page.label(configs[index])
                    bar.set_description(f"{about}, {label}")
                    sums = evaluation.indexer_pass(each, configs[index], hidden, bar)
                    text.setdefault("passes", {})[str(index)] = sums
                    file.save()
                _log.info("evaluate: %s is done", about)
    finally:
        model.train(training)
    return file.save()
