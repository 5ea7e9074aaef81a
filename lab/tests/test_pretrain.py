# SPDX-License-Identifier: Apache-2.0
"""A tiny decoder: what it learns from, learns, and keeps from one run to the next."""

import json
import math
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lab import base, decoder, distill, passes, pretrain, tasks, text  # noqa: E402

SETTINGS = pretrain.Settings(
    layers=2,
    width=64,
    vocabulary=400,
    stages=["96:0.02", "192:0.01"],
    batch=384,
    rate=1e-2,
    warm_up=5,
    seed=3,
)


@pytest.fixture(scope="module", autouse=True)
def small():
    """On tensors as small as these, threads wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "LOGGED", 39)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batches(tokenizer, tokens):
    return pretrain.Batches(tasks.Maker(tokenizer), tokens, SETTINGS)


def test_stages_by_hand(batches):
    assert pretrain.stages(SETTINGS) == [(96, 52), (192, 26)]
    assert pretrain.stages(SETTINGS._replace(stages=["1000:0.01"])) == [(1000, 10)]
    assert len(batches) == 78 and batches.length(51) == 96 and batches.length(52) == 192
    assert batches[0][0].shape == (4, 96) and batches[77][0].shape == (2, 192)


def test_data_depend_on_the_seed_and_the_step_alone(tokenizer, tokens, batches):
    again = pretrain.Batches(tasks.Maker(tokenizer), tokens, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(batches[60], again[60], strict=True))
    assert not torch.equal(batches[60][0], batches[61][0])
    other = pretrain.Batches(tasks.Maker(tokenizer), tokens, SETTINGS._replace(seed=4))
    assert not torch.equal(batches[60][0], other[60][0])


def test_losses_by_hand():
    """Of logits that are all alike."""
    model = decoder.new(decoder.Shape(1, 64, 50), 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = torch.randint(1, 50, (2, 8))
    roles = torch.tensor([[1, 1, 0, 0, 2, 2, 1, 1]] * 2)
    of_text, of_answers, right = pretrain.losses(model, ids, roles)
    assert [of_text.item(), of_answers.item()] == pytest.approx([math.log(50)] * 2)
    assert right == 0
    ids[:, 4] = 0  # the first of those that are alike
    assert pretrain.losses(model, ids, roles)[2] == 0.5
    assert pretrain.losses(model, ids, torch.ones_like(roles))[1] == 0


def test_steps_without_answers_are_left_out_of_their_mean():
    """Of logits that are all alike, so that every loss is log 50."""
    model = decoder.new(decoder.Shape(1, 64, 50), 0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    plain = torch.ones(1, 8, dtype=torch.uint8)
    asked = plain.clone()
    asked[0, 4:6] = tasks.ANSWER
    ids, state = torch.randint(1, 50, (1, 8)), {}
    still = SETTINGS._replace(rate=0)
    pretrain.run(model, [(ids, roles) for roles in (plain, asked, plain)], still, state)
    (entry,) = state["log"]
    assert [entry["text"], entry["answers"]] == pytest.approx([math.log(50)] * 2)
    assert entry["right"] == 0


def test_rate():
    def rate(step, since):
        return pretrain.rate_at(SETTINGS, step, since, 100)

    assert rate(0, 4) == pytest.approx(1e-2) and rate(0, 0) == pytest.approx(2e-3)
    assert rate(100, 50) == pytest.approx(1e-3) and rate(50, 50) == pytest.approx(5.5e-3)


@pytest.fixture(scope="module")
def whole(batches):
    """The state after a run of all steps."""
    state = {}
    pretrain.run(decoder.new(decoder.Shape(2, 64, 400), 3), batches, SETTINGS, state)
    return state


def test_it_learns(whole):
    first, last = whole["log"]
    assert whole["step"] == last["step"] == 78
    assert last["text"] < 0.9 * first["text"] and last["answers"] < first["answers"]


def test_two_pieces_are_nearly_one(tokenizer, batches, whole, tmp_path):
    """A piece goes on with the same data and the same rate, from weights in bfloat16."""
    stopped, state = decoder.new(decoder.Shape(2, 64, 400), 3), {"settings": SETTINGS._asdict()}
    pretrain.run(stopped, batches, SETTINGS, state, seconds=0)
    assert state["step"] == state["log"][0]["step"] == 1
    decoder.save(tmp_path, stopped, tokenizer, state)
    loaded, same, state = pretrain.begin(tmp_path, [], SETTINGS)
    assert same.get_vocab() == tokenizer.get_vocab()
    for (name, a), b in zip(stopped.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a.bfloat16().float(), b), name
    pretrain.run(loaded, batches, SETTINGS, state)
    assert state["step"] == whole["step"]
    assert state["log"][-1]["text"] == pytest.approx(whole["log"][-1]["text"], rel=0.1)
    with pytest.raises(ValueError, match="expected the settings"):
        pretrain.begin(tmp_path, [], SETTINGS._replace(rate=1))


def test_what_is_killed_goes_on(tokenizer, batches, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    class Until5:
        def __len__(self):
            return len(batches)

        def __getitem__(self, step):
            if step == 5:
                raise Killed
            return batches[step]

    model, state = decoder.new(decoder.Shape(2, 64, 400), 3), {"settings": SETTINGS._asdict()}
    monkeypatch.setattr(passes, "KEPT", 0)
    with pytest.raises(Killed):
        pretrain.run(
            model,
            Until5(),
            SETTINGS,
            state,
            keep=lambda: decoder.save(tmp_path, model, tokenizer, state),
        )
    loaded, _, state = pretrain.begin(tmp_path, [], SETTINGS)
    assert state["step"] == 5
    pretrain.run(loaded, batches, SETTINGS, state, seconds=0)
    assert state["step"] == state["log"][0]["step"] == 6


def test_files_are_small_and_transformers_reads_them(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "FILE_BYTES", (1 << 16) + 60_000)
    model = decoder.new(decoder.Shape(2, 64, 400), 0)
    for _ in range(2):  # the second one over the first one
        decoder.save(tmp_path, model, tokenizer, {"step": 7})
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < decoder.FILE_BYTES and not (tmp_path / "part").exists()
    loaded, same = decoder.load(tmp_path, torch.float32)
    assert same("The code")["input_ids"] == tokenizer("The code")["input_ids"]
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=0.02, rtol=0.02)


def test_the_program_and_what_follows_it(book, tmp_path, monkeypatch, capsys):
    """One run, another piece, indexers distilled from it, and what is measured with them."""
    from lab import language, quality, retrieval, selection, traces

    made, indexers = tmp_path / "decoder", tmp_path / "indexers"
    given = ["--text", str(book), "--stages", "96:0.004", "128:0.002"]
    given += ["--layers", "2", "--width", "128", "--vocabulary", "400", "--batch", "384"]

    def call(program, *arguments):
        monkeypatch.setattr(sys, "argv", ["lab", *map(str, arguments)])
        assert program.main() == 0
        return capsys.readouterr().out

    assert json.loads(call(pretrain, made, *given, "--minutes", 0).splitlines()[-1])["step"] == 1
    out = call(pretrain, made, *given)
    assert "needles" in out
    state = decoder.state_of(made)
    assert state["checks"][-1]["step"] == state["step"] == 15
    assert call(pretrain, made, *given) in out  # it is through
    less = tmp_path / "less.jsonl"
    less.write_text("".join(book.read_text().splitlines(keepends=True)[:30]))
    with pytest.raises(SystemExit):
        call(pretrain, made, "--text", less, *given[2:])
    err = capsys.readouterr().err
    assert f"expected the text with the digest {state['text']}, got " in err
    (entry,) = state["checks"][-1]["lengths"]
    assert entry["length"] == 256 and 0 <= entry["needle"] <= 1

    from_it = ["--text", book, "--base", made, "--length", 192]
    call(distill, indexers, *from_it, "--heads", 16, "--rank", 8, "--rows", 16, "--steps", 2)
    assert decoder.state_of(indexers)["base"] == "decoder from scratch, seed 0, 15 steps"
    with pytest.raises(SystemExit):
        call(distill, tmp_path / "large", *from_it, "--heads", 64, "--rank", 1021)
    # 1020 rows of 64 heads of 128 in bfloat16 are 64 KiB less than 16 MiB.
    err = capsys.readouterr().err
    assert "--rank: expected at most 1020, so that a matrix of 8192 columns fits a file" in err
    assert ", got 1021" in err
    call(quality, indexers, *from_it, "--top-k", 16, "--windows", 2, "--rows", 4)
    found = json.loads((indexers / "quality-192.json").read_text())
    assert found["layers"] and found["least"] == 169
    with pytest.raises(SystemExit):
        call(quality, indexers, *from_it, "--top-k", 169)
    assert "--top-k: expected at most 168, 7/8 of --length, got 169" in capsys.readouterr().err
    layers = ["--top-k", 16, "--windows", 1, "--rows", 4, "--layers"]
    call(selection, indexers, *from_it, *layers, 1, 0)
    whole = indexers / "selection-192-16.json"
    before = whole.read_text()
    assert json.loads(before)["least"] == 169
    call(selection, indexers, *from_it, *layers, 1)
    (some,) = indexers.glob("layers-*.json")
    (entry,) = json.loads(some.read_text())["results"][0]["layers"]
    assert entry["layer"] == 1 and whole.read_text() == before
    assert list(indexers.glob("selection-*")) == [whole]
    for wrong, got in (([2], "[2]"), ([0, -1], "[0, -1]"), ([], "[]")):
        with pytest.raises(SystemExit):
            call(selection, indexers, *from_it, *layers, *wrong)
        assert f"--layers: expected some of 0 to 1, got {got}" in capsys.readouterr().err
    assert "layer1" in call(traces, indexers, tmp_path / "traces", *from_it, "--layers", 1)
    from_it = ["--text", book, "--base", made, "--length", 256, "--top-k", 16]
    out = call(retrieval, indexers, *from_it, "--depths", 2, "--contexts", 1)
    assert "needles" in out and "misa-r:h=7" in out
    again = call(retrieval, indexers, *from_it, "--depths", 2, "--contexts", 1)
    assert "passes" not in again and again == out[out.index(again) :]
    with pytest.raises(ValueError, match="expected the settings"):
        call(retrieval, indexers, "--text", less, *from_it[2:], "--depths", 2, "--contexts", 1)
    from_it += ["--windows", 1, "--indexers", "recency"]
    assert "recency" in call(language, indexers, *from_it)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"task": "qasper", "id": 0, "prompt": "a", "gold": ["x"]}')
    with pytest.raises(ValueError, match="expected the settings"):
        call(language, indexers, *from_it, "--prompts", prompts)
    found = base.load(made, 256, torch.device("cpu"), torch.float32)
    assert found.note == ", trained on 128 tokens at most"


def test_indexers_of_another_model_are_refused(model, windows, tmp_path):
    few = distill.Settings(
        heads=4, rank=8, length=96, rows=8, steps=1, rate=1e-3, warm_up=1, seed=0
    )
    distill.run(model, windows, tmp_path, few, name="one")
    with pytest.raises(ValueError, match="expected the one, got the other"):
        distill.run(model, windows, tmp_path, few, name="other")
    with pytest.raises(ValueError, match=r"expected a folder of lab\.pretrain"):
        base.load(tmp_path, 96, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "option, message",
    [
        (["--stages", "96"], "--stages: expected LENGTH:MILLIONS, got '96'"),
        (["--width", "100"], "--width: expected a multiple of 64, got 100"),
        # 130,560 rows of 128 bytes and a header of 64 KiB are 16 MiB.
        (
            ["--vocabulary", "130561"],
            "--vocabulary: expected at most 130560, whose embedding of --width 64 fits a file, "
            "got 130561",
        ),
        (["--stages", "999999:1"], "text: expected 999999 tokens or more, got "),
    ],
)
def test_what_is_refused(option, message, book, tmp_path, monkeypatch, capsys):
    given = ["lab", str(tmp_path), "--text", str(book), "--vocabulary", "400", "--width", "64"]
    monkeypatch.setattr(sys, "argv", [*given, *option])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert message in capsys.readouterr().err


def test_held_out_text_is_not_learned(book):
    titles = {document.title for document in text.documents([book])}
    assert {text.is_held_out(title) for title in titles} == {True, False}
