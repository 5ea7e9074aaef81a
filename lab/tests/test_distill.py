# SPDX-License-Identifier: Apache-2.0
"""Distillation on a tiny random model: what is learned, kept, resumed and written."""

import json
import math
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny import LENGTH  # noqa: E402

import misa  # noqa: E402
from lab import base, distill, indexer, passes, text, traces  # noqa: E402

SETTINGS = distill.Settings(
    heads=8, rank=64, length=LENGTH, rows=48, steps=60, rate=1e-2, warm_up=5, seed=3
)


def test_attention_is_the_models(model, windows):
    rows = torch.tensor([0, 5, LENGTH - 1])
    model.set_attn_implementation("eager")
    whole = model.model(windows[0][None], output_attentions=True).attentions
    found = []
    with base.watched(
        model, lambda i, module, *seen: found.append(base.attention(module, *seen, rows))
    ):
        model.model(windows[0][None])
    for mine, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(mine, theirs[0].mean(0)[rows])


def test_divergence_by_hand():
    target = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    found = torch.tensor([[3.0, 9.0], [0.0, math.log(3.0)]])
    rows = torch.tensor([0, 1])
    assert distill.divergence(target, found, rows) == pytest.approx(0, abs=1e-6)
    even = distill.divergence(target[1:], torch.zeros(1, 2), rows[1:])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert even == pytest.approx(expected, rel=1e-5)


def test_indexers_learn_and_go_on(model, windows, tmp_path):
    said: list[str] = []
    whole = distill.run(model, windows, tmp_path / "whole", SETTINGS, say=said.append)
    assert whole["step"] == SETTINGS.steps and len(said) == 3
    assert whole["log"][-1]["kl"] < 0.8 * whole["log"][0]["kl"]
    # In two pieces: the second one goes on from the first one's file.
    stopped = distill.run(model, windows, tmp_path / "two", SETTINGS, seconds=0)
    assert stopped["step"] == 0
    again = distill.run(model, windows, tmp_path / "two", SETTINGS)
    assert again["step"] == SETTINGS.steps
    # From weights that were rounded to bfloat16 when they were kept.
    assert again["log"][-1]["kl"] == pytest.approx(whole["log"][-1]["kl"], rel=0.1)
    assert distill.run(model, windows, tmp_path / "two", SETTINGS)["log"] == again["log"]
    with pytest.raises(ValueError, match="expected the settings"):
        distill.run(model, windows, tmp_path / "two", SETTINGS._replace(heads=4))


def test_what_is_killed_goes_on(model, windows, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    class Until5:
        digest = windows.digest

        def __getitem__(self, step):
            if step == 5:
                raise Killed
            return windows[step]

    monkeypatch.setattr(passes, "KEPT", 0)
    few = SETTINGS._replace(steps=6)
    with pytest.raises(Killed):
        distill.run(model, Until5(), tmp_path, few)
    assert indexer.state_of(tmp_path)["step"] == 5
    state = distill.run(model, windows, tmp_path, few)
    assert state["step"] == 6 and [entry["step"] for entry in state["log"]] == [6]


def test_only_finite_numbers_are_kept():
    saved = []
    model = torch.nn.Linear(2, 1)
    keeping = passes.Keeping(model, lambda: saved.append(1))
    keeping.now()  # not due yet
    assert saved == []
    keeping.now(due=True)
    assert saved == [1]
    with torch.no_grad():
        model.weight[0, 1] = math.nan
    with pytest.raises(RuntimeError, match="weight: expected finite numbers"):
        keeping.now(due=True)
    assert saved == [1]


def test_a_mean_is_of_the_steps_of_this_start(model, windows, tmp_path):
    """One step before a stop and one after it, which is the mean; nothing is learned."""
    still = SETTINGS._replace(steps=2, rate=0)
    last = distill.run(model, windows, tmp_path / "last", still._replace(steps=1))
    losses = [last["log"][0]["kl"]]
    shape = indexer.Shape(2, 128, 8, 64)
    made, state = indexer.load(tmp_path / "last", shape), {**last, "log": []}
    state["settings"] = {**last["settings"], "steps": 2}
    indexer.save(tmp_path / "again", made, state)
    losses.append(distill.run(model, windows, tmp_path / "again", still)["log"][0]["kl"])
    whole = distill.run(model, windows, tmp_path / "whole", still)["log"][0]["kl"]
    assert whole == pytest.approx(sum(losses) / 2, rel=1e-3)


def test_files_are_small_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(indexer, "FILE_BYTES", (1 << 16) + 20_000)
    shape = indexer.Shape(layers=3, width=32, heads=4, rank=8)
    made = torch.nn.ModuleList(indexer.Indexer(shape) for _ in range(3))
    indexer.save(tmp_path, made, {"step": 7})
    assert len(list(tmp_path.glob("indexers-*"))) > 1 and not list(tmp_path.glob("*.part"))
    loaded = indexer.load(tmp_path, shape)
    assert indexer.state_of(tmp_path) == {"step": 7}
    for (name, a), b in zip(made.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.bfloat16().float(), b), name
    for path in tmp_path.glob("indexers-*"):
        path.unlink()
    with pytest.raises(ValueError, match="expected the indexers too"):
        indexer.load(tmp_path, shape)


def test_traces_are_compared(model, windows, tmp_path):
    distill.run(model, windows, tmp_path, SETTINGS._replace(steps=2))
    indexers = indexer.load(tmp_path, indexer.Shape(2, 128, 8, 64))
    paths = traces.write(model, indexers, windows[1], tmp_path / "out", [1], "a test")
    from safetensors.torch import load_file

    (path,) = paths
    found = load_file(path)
    assert found["attn_last32"].float().sum(1) == pytest.approx(torch.ones(32), abs=0.02)
    q, w, k = (found[name] for name in ("q", "w", "k"))
    expected = indexer.scores(q.float(), w, k.float())
    selected = misa.select(q, w, k, found["ks"], found["ke"], config=misa.Config("dsa", top_k=8))
    for row, (indices, end) in enumerate(zip(selected.indices, found["ke"].tolist(), strict=True)):
        best = expected[row, :end].topk(8)
        worst = expected[row, indices.long()].min()
        assert worst >= best.values[-1] - 1e-4 * best.values.abs().max()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".txt", ".txt.xz"])
def test_documents(tmp_path, suffix):
    import lzma

    name = tmp_path / f"a{suffix}"
    opened = lzma.open if suffix.endswith(".xz") else open
    with opened(name, "wt") as file:
        if ".jsonl" in suffix:
            file.write(json.dumps({"text": "one", "title": "t"}) + "\n" + json.dumps({"text": "x"}))
        else:
            file.write("one")
    found = list(text.documents([tmp_path]))
    assert found[0].text == "one" and len(found) == (2 if ".jsonl" in suffix else 1)
    # Compressed or not, a document is on the same side of the split.
    assert found[-1].title == ("a.jsonl:2" if ".jsonl" in suffix else "a.txt")
    with pytest.raises(ValueError, match=r"expected \.txt or \.jsonl"):
        list(text.documents(["a.pdf"]))


def test_windows_depend_on_their_number_alone():
    texts = [np.arange(50, dtype=np.int32), np.arange(100, 103, dtype=np.int32)]
    windows = text.Windows(texts, 10, seed=1)
    assert torch.equal(windows[3], text.Windows(texts, 10, seed=1)[3])
    assert any(not torch.equal(windows[i], windows[0]) for i in range(1, 5))
    with pytest.raises(ValueError, match="expected 60 tokens or more, got 53"):
        text.Windows(texts, 60, seed=1)


def test_text_is_told_from_other_text():
    import zlib

    texts = [np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32)]
    bytes_of = b"2 \1\0\0\0\2\0\0\0" + b"1 \3\0\0\0"
    assert text.digest(texts) == f"{zlib.crc32(bytes_of):08x}"
    assert text.digest(texts) != text.digest([np.array([1, 2, 3], dtype=np.int32)])
    assert text.Windows(texts[:1], 2, seed=1).digest == text.digest(texts[:1])


def test_other_text_is_refused(model, windows, tmp_path):
    few = SETTINGS._replace(steps=1)
    other = text.Windows([np.arange(LENGTH, dtype=np.int32) % 40], LENGTH, 0)
    state = distill.run(model, windows, tmp_path, few)
    assert state["text"] == windows.digest
    assert distill.run(model, windows, tmp_path, few) == state
    message = f"expected the text with the digest {windows.digest}, got {other.digest}"
    with pytest.raises(ValueError, match=message):
        distill.run(model, other, tmp_path, few)
    # A state that does not say what was learned.
    path = tmp_path / "state.json"
    path.write_text(json.dumps({k: v for k, v in state.items() if k != "text"}))
    assert distill.run(model, other, tmp_path, few)["text"] == other.digest


def test_windows_are_spread_over_documents():
    texts = [np.arange(first, first + 50, dtype=np.int32) for first in (0, 100, 200)]
    windows = text.Windows(texts, 10, seed=1)
    found, documents = windows.spread(7)
    assert [int(window[0]) // 100 for window in found] == documents
    assert sorted(documents.count(i) for i in range(3)) == [2, 2, 3]
    assert len(set(documents[:3])) == 3 and len({int(window[0]) for window in found}) > 3
    again, _ = text.Windows(texts, 10, seed=1).spread(5)
    assert all(map(torch.equal, again, found[:5]))


def test_the_split_is_by_title():
    titles = [f"book {i}" for i in range(400)]
    share = sum(map(text.is_held_out, titles)) / len(titles)
    assert 0.12 < share < 0.26
    assert not text.is_held_out("b5.txt") and text.is_held_out("b5.txt", share=15)  # 14 of 16


def test_what_a_base_learned_is_not_held_out(tmp_path, monkeypatch, capsys):
    given = ["--text", "a.txt", "--base", str(tmp_path), "--held-out", "4"]
    monkeypatch.setattr(sys, "argv", ["lab", str(tmp_path), *given])
    with pytest.raises(SystemExit):
        distill.main()
    message = "--held-out: expected at most 3 with --base, which learned the other documents, got 4"
    assert message in capsys.readouterr().err
