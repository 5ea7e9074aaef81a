# SPDX-License-Identifier: Apache-2.0
"""What indexers cost on a model: figures by hand and beside the model itself, and resumption."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.24")

import accelerate  # noqa: E402
from models import ARCHITECTURES, TOP_K, VOCABULARY, build, indexers_of, tokens_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402
from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: E402

import misa  # noqa: E402
from misa.integrations import _evaluate as passes  # noqa: E402
from misa.integrations import _evaluate_command as command  # noqa: E402
from misa.integrations import _evaluate_measures as measures  # noqa: E402
from misa.integrations import _evaluate_page as page  # noqa: E402
from misa.integrations import transformers as integration  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ONE = misa.Config("misa", top_k=TOP_K, heads=1)
DSA = misa.Config("dsa", top_k=TOP_K)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest, device: str) -> torch.nn.Module:
    return build(request.param, device)


def text_of(length: int) -> torch.Tensor:
    return tokens_of("cpu", 1, length)[0]


def evaluate(model: torch.nn.Module, texts: list[Any], *args: Any, **options: Any) -> Any:
    return integration.evaluate(model, texts, *args, **{"progress": False, **options})


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """The number of tokens of each forward pass inside the block."""
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        yield lengths
    finally:
        hook.remove()


def without_times(result: dict[str, Any]) -> Any:
    """What two runs of the same passes have in common."""
    result = json.loads(json.dumps(result))
    for text in result["sums"]:
        text.pop("waited", None)
        for layer in text["layers"].values():
            layer.pop("seconds", None)
    return {"sums": result["sums"], "settings": result["settings"]}


def test_logits_by_hand() -> None:
    half, quarter = math.log(1 / 2), math.log(1 / 4)
    own = torch.tensor([[half, quarter, quarter], [half + 3, quarter + 3, quarter + 3]])
    other = torch.tensor([[quarter, half, quarter], [half, quarter, quarter]])
    # More than are taken at once.
    figures = measures.compare_logits(
        own.repeat(40, 1), other.repeat(40, 1), torch.tensor([1, 0]).repeat(40)
    )
    ln2 = math.log(2)
    for name, expected in {
        "kl": [ln2 / 4, 0],  # 1/2 ln 2 - 1/4 ln 2; a constant added to all logits is nothing
        "top1": [0, 1],
        "own_loss": [2 * ln2, ln2],
        "loss": [ln2, ln2],
    }.items():
        assert figures[name].tolist() == pytest.approx(expected * 40, abs=1e-6), name


def test_selections_by_hand() -> None:
    own = torch.tensor([[0, 2, 5], [1, 3, 4]], dtype=torch.int32)
    mask = measures.mask_of(torch.tensor([[5, -1, 2], [3, 1, 4]], dtype=torch.int32), 6)
    assert mask.int().tolist() == [[0, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0]]
    selected = torch.tensor([[2, 4, -1], [4, 3, 1]], dtype=torch.int32)
    shares = measures.recall(measures.mask_of(own, 6), selected)
    assert shares.tolist() == pytest.approx([1 / 3, 1])
    attention = torch.tensor([[0.5, 0.125, 0.25, 0, 0.125, 0], [0.125, 0, 0.25, 0.5, 0, 0.125]])
    assert measures.attention_on(attention, selected).tolist() == [0.375, 0.5]


def test_summary_by_hand() -> None:
    def layer(rows: int, recall: list[float], seconds: list[float], attention: list[float]) -> Any:
        least = [share / rows / 2 for share in recall]
        sums = {"rows": rows, "recall": recall, "recall_min": least, "seconds": seconds}
        return {**sums, "attention_rows": 2, "attention": attention}

    def positions(count: int, kl: float, kl_max: float) -> dict[str, float]:
        means = {"kl": kl, "top1": count / 2, "loss": 3.0 * count, "own_loss": 2.0 * count}
        return {"positions": count, **means, "kl_max": kl_max}

    texts = [
        {
            "layers": {
                "2": layer(4, [4, 3], [8, 2], [1.5, 1.5, 1.2]),
                "10": layer(4, [4, 2], [4, 4], [1, 1, 1]),
                "3": {"attention_rows": 2, "attention": [2, 2, 1]},
            },
            "passes": {"1": {"16": positions(10, 1.0, 0.5), "32": positions(30, 9.0, 0.75)}},
        },
        {
            "layers": {
                "2": layer(12, [12, 11], [8, 2], [0.5, 0.5, 0.4]),
                "10": layer(12, [12, 10], [4, 4], [1, 1, 1]),
                "3": {"attention_rows": 2, "attention": [2, 2, 2]},
            },
            "passes": {"1": {"16": positions(10, 3.0, 0.25)}},
        },
    ]
    layers, (dsa, one) = measures.summarize(texts, 1, {"3": 2})
    assert [(each["layer"], each["shares"], each["rows"]) for each in layers] == [
        (2, None, 16),
        (3, 2, None),
        (10, None, 16),
    ]
    assert [each["attention_own"] for each in layers] == [0.5, 1, 0.5]
    assert dsa["output"] is None and dsa["recall"]["mean"] == 1
    assert one["recall"] == {"mean": (14 / 16 + 12 / 16) / 2, "worst": 0.75, "worst_layer": 10}
    assert one["layers"][0]["recall_min"] == pytest.approx(3 / 8)
    assert one["attention_kept"]["worst"] == pytest.approx(0.75)
    assert one["attention_kept"]["worst_layer"] == 3
    assert one["attention_kept"]["mean"] == pytest.approx((0.8 + 0.75 + 1) / 3)
    # 24 seconds of DSA against 12; its layers' ratios are 4 and 1.
    assert one["less_time"] == {"times": 2, "quartiles": [1.75, 3.25]}
    assert one["layers"][0]["us_per_query"] == pytest.approx(4 / 16 * 1e6)
    assert one["layers"][1]["us_per_query"] is None
    output = one["output"]
    assert output["positions"] == 50 and output["kl"] == 13 / 50 and output["kl_max"] == 0.75
    assert (output["top1"], output["loss"], output["own_loss"]) == (0.5, 3, 2)
    assert output["kl_by_text"] == [10 / 40, 3 / 10]
    assert [(each["keys"], each["kl"]) for each in output["by_keys"]] == [(16, 4 / 20), (32, 0.3)]


def test_verdict_by_hand() -> None:
    config = {"label": page.label(misa.Config("misa-r", heads=3, candidates=4096))}
    result = {
        "config": config,
        "less_time": {"times": 4.6},
        "output": {"kl": 0.00312},
        "attention_kept": {"worst": 0.9712, "worst_layer": 17},
        "recall": {"worst": 0.88, "worst_layer": 3},
    }
    assert page.verdict(result) == (
        "MISA-R 3 + 1, m = 4096: 4.6 × less indexer time, KL 0.0031, worst layer 17 keeps 97.1 %"
    )
    result |= {"attention_kept": None, "less_time": {"times": 0.8}, "output": None}
    assert page.verdict(result) == (
        "MISA-R 3 + 1, m = 4096: 1.2 × more indexer time, worst layer 3 finds 88.0 % of the set"
    )
    result |= {"recall": None, "less_time": None}
    assert page.verdict(result) == "MISA-R 3 + 1, m = 4096: not measured yet"


def test_labels_and_notation() -> None:
    for text, label, config in (
        ("dsa", "DSA", misa.Config("dsa", top_k=16)),
        ("misa:h=2", "MISA 2", misa.Config("misa", top_k=16, heads=2)),
        (
            "misa-r:h=3:m=2k",
            "MISA-R 3 + 1, m = 32",
            misa.Config("misa-r", top_k=16, heads=3, candidates=32),
        ),
        (
            "hisa:B=64:blocks=3",
            "HISA 3 × 64",
            misa.Config("hisa", top_k=16, filter_block=64, filter_blocks=3),
        ),
        (
            "misa:B=128:router=qnorm",
            "MISA 8, router = qnorm, block = 128",
            misa.Config("misa", top_k=16, router="qnorm", block=128),
        ),
        (
            "misa-r:h=3:m=4k:sketch=2",
            "MISA-R 3 + 1, m = 64, sketch = 2",
            misa.Config("misa-r", top_k=16, heads=3, candidates=64, sketch=2),
        ),
        (
            "auto:dense=2k",
            None,
            misa.Config("auto", top_k=16, dense_work=32),
        ),
    ):
        assert passes.parse(text, 16) == config
        assert label in (None, page.label(config))
    # The messages are those of the program's --indexers (tests/cli/variant_test.cpp).
    for text, message in (
        ("misa:h=2k", "misa:h=2k: expected a number after h=, got '2k'"),
        ("misa:h=-2", "misa:h=-2: expected a number after h=, got '-2'"),
        ("misa:m", "misa:m: expected a number after m=, got ''"),
        ("misa:m=9999999k", "misa:m=9999999k: expected a number after m=, got '9999999k'"),
        (
            "misa:heads=8",
            "misa:heads=8: expected h=, m=, sketch=, dense=, B=, blocks= or router=, got 'heads=8'",
        ),
        (
            "best",
            "indexer: expected dsa, misa, misa-dagger, misa-r, hisa, auto, got 'best'",
        ),
    ):
        with pytest.raises(ValueError) as error:
            passes.parse(text, 1024)
        assert str(error.value) == message


@torch.no_grad()
def test_figures_of_a_model(model: torch.nn.Module, device: str, tmp_path: Path) -> None:
    """In one chunk: output beside the enabled model's own, layers beside compare on a capture."""
    text = text_of(60)
    result = evaluate(model, [text], [ONE, DSA], chunk=64)
    assert result["complete"]
    one, dsa = result["indexers"]

    tokens = text[None].to(device)
    with integration.capture(model, tmp_path / "trace{layer}"):
        own = model(tokens, use_cache=True).logits[0].double().cpu()
    integration.enable(model, heads=1)
    other = model(tokens, use_cache=True).logits[0].double().cpu()
    integration.disable(model)
    counted = slice(TOP_K, -1)
    p, q = own.log_softmax(-1)[counted], other.log_softmax(-1)[counted]
    kl = (p.exp() * (p - q)).sum(-1)
    output = one["output"]
    assert output["positions"] == 60 - 1 - TOP_K
    assert output["kl"] == pytest.approx(kl.mean().item(), rel=1e-6)
    assert output["kl_max"] == pytest.approx(kl.max().item(), rel=1e-6)
    assert output["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    for name, each in (("own_loss", p), ("loss", q)):
        loss = torch.nn.functional.nll_loss(each, text[TOP_K + 1 :])
        assert output[name] == pytest.approx(loss.item(), rel=1e-6)
    assert [each["keys"] for each in output["by_keys"]] == [16, 32]
    assert output["by_keys"][0]["kl"] == pytest.approx(kl[: 32 - 17].mean().item(), rel=1e-6)
    assert dsa["output"]["kl"] < 1e-6 < output["kl"]

    for each in indexers_of(model):
        layer = each.layer_idx
        trace = load_file(tmp_path / f"trace{layer}")
        attention = trace.pop("attn_last32").float()
        (expected,) = misa.compare(**trace, configs=[ONE], baseline=DSA)
        figures = one["layers"][layer]
        assert figures["layer"] == layer
        assert figures["recall"] == pytest.approx(expected["recall_mean"])
        assert figures["recall_min"] == pytest.approx(expected["recall_min"])
        assert figures["us_per_query"] > 0
        # Of all rows that count, 16 are looked at.
        rows = torch.linspace(TOP_K, 59, 16, dtype=torch.float64).round().long()
        there = rows[rows >= 28]
        kept = [
            measures.attention_on(attention, misa.select(**trace, config=config).indices[-32:])[
                there - 28
            ].sum()
            for config in (ONE, DSA)
        ]
        sums = result["sums"][0]["layers"][str(layer)]
        assert sums["attention_rows"] == 16
        assert sums["attention"][2] >= kept[0] and sums["attention"][0] >= kept[1]
        assert figures["attention_kept"] == sums["attention"][2] / sums["attention"][0]
    assert dsa["recall"]["worst"] == pytest.approx(1)
    assert dsa["attention_kept"]["worst"] == pytest.approx(1)
    assert dsa["less_time"]["times"] == 1


@torch.no_grad()
def test_attention_that_is_kept(tmp_path: Path) -> None:
    """Every row that counts is looked at: the sums are those of the captured attention."""
    model, text = build("deepseek"), text_of(TOP_K + 16)
    (one,) = evaluate(model, [text], [ONE])["indexers"]
    with integration.capture(model, tmp_path / "trace", layers=1):
        model(text[None], use_cache=True)
    trace = load_file(tmp_path / "trace")
    attention = trace.pop("attn_last32")[TOP_K:].float()
    kept, own = (
        measures.attention_on(attention, misa.select(**trace, config=config).indices[TOP_K:])
        for config in (ONE, DSA)
    )
    assert one["layers"][1]["attention_kept"] == pytest.approx(
        (kept.sum() / own.sum()).item(), rel=2**-7
    )


@torch.no_grad()
def test_chunks_give_what_one_chunk_gives(model: torch.nn.Module) -> None:
    texts = [text_of(50), text_of(37).tolist()]
    whole, parts = (evaluate(model, texts, [DSA], chunk=chunk) for chunk in (64, 13))
    for a, b in zip(whole["sums"], parts["sums"], strict=True):
        assert {n: each.get("rows") for n, each in a["layers"].items()} == {
            n: each.get("rows") for n, each in b["layers"].items()
        }
        for keys, sums in a["passes"]["1"].items():
            assert b["passes"]["1"][keys]["positions"] == sums["positions"]
            for name in ("loss", "own_loss"):
                assert b["passes"]["1"][keys][name] == pytest.approx(sums[name], rel=1e-3)
    assert parts["indexers"][0]["recall"]["worst"] > 0.99
    assert parts["indexers"][0]["output"]["positions"] == 50 + 37 - 2 * (1 + TOP_K)


@torch.no_grad()
def test_shared_layers() -> None:
    """A layer without an indexer: the attention that the selection of an earlier layer keeps."""
    result = evaluate(build("glm"), [text_of(60)], [ONE])
    assert [layer["shares"] for layer in result["layers"]] == [None, 0, None]
    shared = result["indexers"][0]["layers"][1]
    assert shared["recall"] is None and shared["us_per_query"] is None
    assert 0 < shared["attention_kept"] < 1.5
    assert result["sums"][0]["layers"]["1"]["attention_rows"] == 16


@torch.no_grad()
def test_dispatched_model(model: torch.nn.Module, tmp_path: Path) -> None:
    """The last layer's weights are on the disk."""
    whole = evaluate(model, [text_of(40)], [ONE], chunk=16)
    first = {"cuda": 0}.get(model.device.type, model.device.type)
    parts = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), first
    )
    layers = {"model.layers.0": first, "model.layers.1": first, "model.layers.2": "disk"}
    accelerate.dispatch_model(model, {**parts, **layers}, main_device=first, offload_dir=tmp_path)
    spread = evaluate(model, [text_of(40)], [ONE], chunk=16)
    assert spread["settings"]["weights"] is None
    assert without_times(spread)["sums"] == without_times(whole)["sums"]


class Table(HTMLParser):
    """The rows of the tables of a page, and the names of its elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attributes)}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data


@pytest.mark.parametrize(
    ("architecture", "layers"), [("deepseek", 61), ("glm", 78)], ids=["61", "78"]
)
@torch.no_grad()
def test_many_layers(architecture: str, layers: int, tmp_path: Path) -> None:
    own: dict[str, Any] = {"num_hidden_layers": layers, "first_k_dense_replace": layers}
    if architecture == "glm":
        own["indexer_types"] = [
            "full" if layer < 3 or layer % 4 == 2 else "shared" for layer in range(layers)
        ]
    model = build(architecture, **own)
    result = evaluate(
        model, [text_of(40)], [ONE, "misa-r:h=3:m=2k"], path=tmp_path / "e.json", chunk=24
    )
    assert [layer["layer"] for layer in result["layers"]] == list(range(layers))
    full = [each.layer_idx for each in indexers_of(model)]
    for each in result["indexers"]:
        assert [i for i, layer in enumerate(each["layers"]) if layer["recall"]] == full
        assert all(0 < layer["attention_kept"] <= 1.5 for layer in each["layers"])
    text = (tmp_path / "e.html").read_text()
    summary, by_keys, attention, recall, times = Table(text).tables
    assert [row[0] for row in summary] == [
        "indexer",
        "DSA, all heads",
        "MISA 1",
        "MISA-R 3 + 1, m = 32",
    ]
    assert len(attention) == 1 + layers and len(recall) == len(times) == 1 + len(full)
    if architecture == "glm":
        assert attention[1 + 5][0] == "5 (as 2)" and attention[1 + 6][0] == "6"
    assert all(len(row) == 4 for table in (attention, recall, times) for row in table)
    assert [row[0] for row in by_keys[1:]] == ["16 to 31", "32 to 63"]


def test_only_one_layer_is_kept() -> None:
    """While a layer runs, what the ones before it selected and attended to is gone."""
    model = build("deepseek", num_hidden_layers=12, first_k_dense_replace=12)
    alive: list[int] = []
    gone: list[Any] = []

    def dense(*args: Any) -> torch.Tensor:
        result = original(*args)
        gone.append(torch.utils.weak.WeakTensorKeyDictionary({result: None}))
        alive.append(sum(len(each) for each in gone))
        return result

    original = passes.dense_attention
    with mock.patch.object(passes, "dense_attention", dense):
        evaluate(model, [text_of(40)], [ONE])
    assert len(alive) == 12 and set(alive) == {1}


@torch.no_grad()
def test_page_is_one_file(tmp_path: Path) -> None:
    model = build("glm")
    model.config._name_or_path = "<b>name</b>"
    result = evaluate(model, [text_of(40)], [ONE], path=tmp_path / "e.json")
    text = (tmp_path / "e.html").read_text()
    assert escape(result["indexers"][0]["verdict"]) in text.replace("&nbsp;", " ")
    assert "&lt;b&gt;name" in text and "<b>" not in text
    assert "http" not in text
    assert not Table(text).names & {"script", "link", "img", "src", "href", "iframe"}
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads(json.dumps(result))


@torch.no_grad()
def test_without_attention(tmp_path: Path) -> None:
    model = build("deepseek")
    for module in model.modules():
        if isinstance(module, integration.deepseek.DeepseekV32Attention):
            module.__class__ = type("Other", (torch.nn.Module,), dict(vars(module.__class__)))
    result = evaluate(model, [text_of(40)], [ONE], path=tmp_path / "e.json")
    (one,) = result["indexers"]
    assert one["attention_kept"] is None and one["recall"]["worst"] < 1
    assert " of the set" in one["verdict"]
    page_text = (tmp_path / "e.html").read_text()
    assert "Attention is missing" in page_text and "Attention kept by layer" not in page_text


@pytest.mark.parametrize("stop", range(1, 7))
@torch.no_grad()
def test_resumption(stop: int, tmp_path: Path) -> None:
    """Interrupted in any pass, a rerun gives what one run gives, and repeats own passes only."""
    texts, indexers = [text_of(40), text_of(30)], [ONE, "misa-r:h=2"]
    path = tmp_path / "e.json"
    model = build("glm")
    before = {name: (type(each), dict(vars(each))) for name, each in model.named_modules()}
    whole = evaluate(model, texts, indexers, chunk=64)

    runs = 0
    original = passes._Evaluation._run

    def interrupted(self: Any, tokens: Any, step: Any, bar: Any) -> None:
        nonlocal runs
        runs += 1

        def last(start: int, logits: torch.Tensor) -> None:
            step(start, logits)
            if runs == stop:
                raise KeyboardInterrupt

        original(self, tokens, last, bar)

    with (
        mock.patch.object(passes._Evaluation, "_run", interrupted),
        pytest.raises(KeyboardInterrupt),
    ):
        evaluate(model, texts, indexers, chunk=64, path=path)
    # Nothing of the pass that was interrupted is left on the model.
    assert integration.usage(model) is None
    assert before == {name: (type(each), dict(vars(each))) for name, each in model.named_modules()}
    if stop > 1:
        part = json.loads(path.read_text())
        assert not part["complete"]
        assert "Not complete" in path.with_suffix(".html").read_text()
    with counted(model) as lengths:
        resumed = evaluate(model, texts, indexers, chunk=64, path=path)
    assert without_times(resumed) == without_times(whole)
    # What is missing of either text, after its own indexers' pass.
    done = stop - 1
    missing = [3 - min(done, 3), 3 - max(done - 3, 0)]
    passes_of = [n if n in (0, 3) else n + 1 for n in missing]
    assert lengths == [40] * passes_of[0] + [30] * passes_of[1]
    with counted(model) as lengths:
        again = evaluate(model, texts, indexers, chunk=64, path=path)
    assert lengths == [] and without_times(again) == without_times(whole)
    assert not list(tmp_path.glob("*.part"))


@torch.no_grad()
def test_files_of_other_settings(tmp_path: Path) -> None:
    model, path = build("deepseek"), tmp_path / "e.json"
    evaluate(model, [text_of(40)], [ONE], path=path, chunk=32)
    for name, change in {
        "texts": {"texts": [text_of(41)]},
        "indexers": {"indexers": [DSA]},
        "chunk": {"chunk": 33},
        "backend": {"backend": "reference"},
    }.items():
        arguments = {"texts": [text_of(40)], "indexers": [ONE], "chunk": 32, **change}
        with pytest.raises(ValueError, match=f"path: .* settings of this call, got {name} = "):
            evaluate(model, path=path, **arguments)
    with torch.no_grad():
        indexers_of(model)[0].wk.weight.add_(1)
    with pytest.raises(ValueError, match="got weights = "):
        evaluate(model, [text_of(40)], [ONE], path=path, chunk=32)
    for other in ("", "[]", '{"settings": 3}'):
        path.write_text(other)
        with pytest.raises(ValueError, match="path: expected a file of evaluate or none"):
            evaluate(model, [text_of(40)], [ONE], path=path, chunk=32)


def test_wrong_arguments(tmp_path: Path) -> None:
    model, text = build("deepseek"), text_of(40)

    def wrong(match: str, **change: Any) -> None:
        arguments: dict[str, Any] = {"texts": [text], "indexers": [ONE], **change}
        with pytest.raises(ValueError, match=match):
            evaluate(arguments.pop("model", model), **arguments)

    wrong("texts: expected a list", texts="text")
    wrong("texts: expected a list", texts=[])
    wrong(r"tokenizer: expected one, for texts\[0\] is a string", texts=["text"])
    wrong(r"texts\[1\]: expected 18 tokens or more, .* index_topk = 16 .* got 17",
          texts=[text, text_of(17)])  # fmt: skip
    wrong(r"texts\[0\]: expected token ids \[T\], got torch.int64 \[1, 40\]", texts=[text[None]])
    wrong(r"texts\[0\]: expected token ids \[T\], got torch.float32", texts=[text.float()])
    wrong(r"texts\[0\]: expected a string or token ids, got dict", texts=[{}])
    wrong(rf"texts\[0\]: expected token ids from 0 to {VOCABULARY - 1}, got", texts=[text + 50])
    wrong("indexers: expected a list", indexers="dsa")
    wrong("indexers: expected a list", indexers=[])
    wrong(r"indexers\[1\]: .*abacus", indexers=["dsa", "abacus"])
    wrong(r"indexers\[0\]: expected a name or a misa.Config, got 3", indexers=[3])
    wrong(r"indexers\[0\].top_k: expected 16, .* got 2048", indexers=[misa.Config("dsa")])
    wrong(r"indexers\[0\]: heads: expected 1 to H = 32, got 33", indexers=["misa:h=33"])
    wrong(r"indexers\[1\]: expected another", indexers=["misa:h=1", ONE])
    wrong("chunk: expected 1 or more, got 0", chunk=0)
    wrong("path: expected a name that ends with .json", path=tmp_path / "e.html")
    wrong("path: expected a folder that exists", path=tmp_path / "none" / "e.json")
    wrong("model: expected one that gives logits, .* got DeepseekV32Model", model=model.model)
    wrong("model: expected one with DeepseekV32Indexer", model=torch.nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="backend: expected .* got 'abacus'"):
        evaluate(model, [text], [ONE], backend="abacus")
    integration.enable(model)
    wrong("model: expected one with its own indexers, got one enabled with", model=model)


def test_logits_that_are_not_finite() -> None:
    model = build("deepseek")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match="model: expected finite logits, .* positions 16 and 38"):
        evaluate(model, [text_of(40)], [ONE])


def test_strings_modes_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("deepseek").train()
    tokens = text_of(40).tolist()
    strings = evaluate(model, ["a text"], [ONE], tokenizer=lambda text: {"input_ids": tokens})
    assert model.training
    assert capsys.readouterr() == ("", "")
    model.eval()
    ids = evaluate(model, [tokens], [ONE], progress=True)
    assert without_times(strings) == without_times(ids)
    bar = capsys.readouterr().err
    assert "text 1 of 1, own indexers" in bar and "2/2" in bar


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a model, a tokenizer of words, and two texts."""
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"?": VOCABULARY - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    build("glm").save_pretrained(tmp_path / "model")
    for name, length in (("long", 60), ("short", 17)):
        text = " ".join(f"w{token}" for token in text_of(length).tolist())
        (tmp_path / name).write_text(text)
    return tmp_path


def test_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = saved / "e.json"
    arguments = [str(saved / "model"), str(saved / "long"), "--indexers", "misa:h=1,misa-r:h=3"]
    arguments += ["--tokens", "50", "--chunk", "20", "-o", str(output), "--device-map", "cpu"]
    assert command.main([*arguments, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert f"misa-evaluate: {saved / 'long'}: the first 50 of 60 tokens; --tokens" in printed.err
    sentences = printed.out.splitlines()
    result = json.loads(output.read_text())
    assert sentences == [
        *(each["verdict"] for each in result["indexers"]),
        f"{output}, {saved / 'e.html'}",
    ]
    assert result["settings"]["texts"][0]["tokens"] == 50 and result["settings"]["chunk"] == 20
    expected = evaluate(build("glm"), [text_of(50)], ["misa:h=1", "misa-r:h=3"], chunk=20)
    assert without_times(expected)["sums"] == without_times(result)["sums"]
    with mock.patch.object(passes._Evaluation, "_run", side_effect=KeyboardInterrupt):
        output.unlink()
        assert command.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err


def test_foot_has_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/misa-evaluate", "a model", "<text>"])
    evaluate(build("deepseek"), [text_of(40)], [ONE], path=tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["command"] == (
        "misa-evaluate 'a model' '<text>'"
    )
    html = (tmp_path / "e.html").read_text()
    assert escape("misa-evaluate 'a model' '<text>'") in html.partition("<footer>")[2]
    assert "title=" not in html  # which the keyboard does not reach


def test_one_threshold_of_a_busy_machine() -> None:
    root = Path(__file__).parents[3]
    (least,) = re.findall(r"kBusy = ([\d.]+);", (root / "cli/timing.hpp").read_text())
    (moved,) = re.findall(r"^BUSY = ([\d.]+)", (root / "scripts/moved.py").read_text(), re.M)
    assert float(least) == float(moved) == page.BUSY
    assert page.busy({"waited_for_processor": page.BUSY}).startswith("The machine was busy")
    assert page.busy({"waited_for_processor": page.BUSY / 2}) == ""


def test_command_errors(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = saved / "model", saved / "long"
    (saved / "bytes").write_bytes(b"\xff\xfe")
    (saved / "llama").mkdir()
    LlamaConfig().save_pretrained(saved / "llama")
    for arguments, message in (
        ([saved / "llama", text], "MODEL: expected one with indexers, .* got .*llama"),
        ([model, text, "--indexers", "dsa,abacus"], "--indexers: .*abacus"),
        ([model, text, "--indexers", "misa:h=99"], r"indexers\[0\]: heads: expected 1 to H = 32"),
        ([model, saved / "short"], "short: expected 18 tokens or more, .* got 17"),
        ([model, saved / "none"], "none"),
        ([model, saved / "bytes"], "bytes: expected text in UTF-8"),
        ([model, text, "--tokens", "0"], "--tokens: expected 1 or more, got 0"),
        ([model, text, "-o", saved / "e.txt"], "path: expected a name that ends with .json"),
    ):
        assert command.main([str(each) for each in arguments]) == 2
        assert re.search(f"^misa-evaluate: .*{message}", capsys.readouterr().err, re.MULTILINE)


def test_command_is_installed() -> None:
    scripts = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'misa-evaluate = "{command.__name__}:{command.main.__name__}"' in scripts
