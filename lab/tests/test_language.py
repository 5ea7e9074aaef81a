# SPDX-License-Identifier: Apache-2.0
"""LongBench's scores by hand, and the comparison on a tiny random model."""

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import LENGTH, VOCABULARY  # noqa: E402

from lab import indexer, language, longbench, sparse  # noqa: E402
from lab.longbench import Prompt  # noqa: E402
from lab.trained import Sample  # noqa: E402

TOP_K = 8


def scored(task, answer, gold, classes=()):
    return longbench.score(Prompt(task, "0", "", gold, list(classes)), answer)


def test_f1_by_hand():
    assert scored("qasper", "The  Cat!", ["cat"]) == 1
    # 2 of 3 words are in an answer of 4.
    assert scored("qasper", "one two five six", ["one, two (three)"]) == pytest.approx(4 / 7)
    assert scored("qasper", "no no", ["no"]) == pytest.approx(2 / 3)  # counted as often as there
    assert scored("qasper", "", ["cat"]) == scored("qasper", "dog", ["cat"]) == 0
    assert scored("qasper", "cat", ["dog", "cat"]) == 1  # the best of the golds


def test_few_shot_answers_end_with_their_line():
    assert scored("triviaqa", "\n\ncat\nPassage: dog", ["cat"]) == 1
    assert scored("qasper", "\n\ncat\nPassage: dog", ["cat"]) == pytest.approx(2 / 4)


def test_classes_by_hand():
    classes = ["City", "Other city", "Date", "Reason"]
    assert scored("trec", "Date", ["Date"], classes) == 1
    assert scored("trec", "Date or Reason", ["Date"], classes) == 0.5
    assert scored("trec", "Reason", ["Date"], classes) == 0
    # A name that is a part of the right one does not count as another.
    assert scored("trec", "Other City, Other city", ["Other city"], ["Other", "Other city"]) == 1


def test_numbers_by_hand():
    assert scored("passage_retrieval_en", "Paragraph 19", ["Paragraph 19"]) == 1
    assert scored("passage_retrieval_en", "19, 3 or 20", ["Paragraph 19"]) == pytest.approx(1 / 3)
    assert scored("passage_count", "none", ["7"]) == 0
    assert scored("passage_count", "17", ["7"]) == 0


def test_code_by_hand():
    assert scored("lcc", "\n```python\n# a comment\nx = 1\ny = 2", ["x = 1"]) == 1
    # x, space, = and space of 5 characters are the same.
    assert scored("lcc", "x = 2", ["x = 1"]) == pytest.approx(0.8)
    assert scored("lcc", "", ["x"]) == 0


def test_rouge_by_hand():
    pytest.importorskip("rouge")
    assert scored("gov_report", "a b c", ["a b c"]) == pytest.approx(1)
    # The longest common sequence of words has 2: of 4 in the answer, of 3 in the gold.
    expected = 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    assert scored("gov_report", "a x c y", ["a b c"]) == pytest.approx(expected)
    assert scored("gov_report", "", ["a"]) == scored("gov_report", "...", ["a"]) == 0


class Letters:
    """A tokenizer: a letter is a token."""

    eos_token_id = VOCABULARY - 1

    def __init__(self, template):
        self.chat_template = template

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) - 97 for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return f"bb{messages[0]['content']}e"

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(97 + i) for i in ids.tolist())


def test_prompts(tmp_path):
    lines = [
        {"task": "qasper", "id": 0, "prompt": "a", "gold": ["x"]},
        {"task": "vcsum", "id": 0, "prompt": "a", "gold": ["x"]},
        {"task": "qasper", "id": 1, "prompt": "a", "gold": ["x"]},
        {"task": "trec", "id": 0, "prompt": "a", "gold": {"answers": ["x"], "all_classes": ["y"]}},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = longbench.prompts(path)
    assert [prompt.name for prompt in found] == ["qasper/0", "trec/0", "qasper/1"]
    assert found[1].gold == ["x"] and found[1].classes == ["y"]
    assert longbench.digest(found) == longbench.digest(longbench.prompts(path))
    assert longbench.digest(found) != longbench.digest([found[0]._replace(text="b"), *found[1:]])
    path.write_text(json.dumps(lines[1]))
    with pytest.raises(ValueError, match="got none"):
        longbench.prompts(path)


def test_long_prompts_lose_their_middle():
    prompt = Prompt("hotpotqa", "0", "abcdefghij", ["x"], [])
    plain = longbench.tokens(prompt, Letters(None), 100)
    assert plain.tolist() == list(range(10))
    assert longbench.tokens(prompt, Letters(None), 32 + 5).tolist() == [0, 1, 7, 8, 9]
    assert longbench.tokens(prompt, Letters("x"), 32 + 6).tolist() == [1, 1, 0, 8, 9, 4]
    assert longbench.tokens(prompt, Letters("x"), 32 + 4).tolist() == [1, 1, 9, 4]
    # 32 of the answer and 3 of the template.
    message = "--length: expected more than the 35 tokens around a prompt of hotpotqa, got 35"
    with pytest.raises(ValueError, match=message):
        longbench.tokens(prompt, Letters("x"), 35)
    shot = prompt._replace(task="lcc")
    assert longbench.tokens(shot, Letters("x"), 64 + 2).tolist() == [0, 9]


@pytest.fixture(scope="module")
def indexers(tmp_path_factory):
    torch.manual_seed(5)
    return indexer.load(tmp_path_factory.mktemp("none"), indexer.Shape(2, 128, 16, 16))


def test_divergence_by_hand(model, indexers, windows, monkeypatch):
    monkeypatch.setattr(language, "ROWS", 30)
    ids = windows[0]
    dsa = language.hidden(model, indexers, sparse.choice("dsa", TOP_K), ids)
    other = language.hidden(model, indexers, None, ids)
    found = language.compare(model, dsa, other, ids, TOP_K)
    counted = slice(TOP_K, LENGTH - 1)
    a, b = (model.lm_head(x)[counted].log_softmax(-1) for x in (dsa, other))
    assert found["kl"] == pytest.approx(float((a.exp() * (a - b)).sum(-1).mean()), rel=1e-4)
    loss = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, counted], ids[TOP_K + 1 :])
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    same = (a.argmax(-1) == b.argmax(-1)).double().mean()
    assert found["top1"] == pytest.approx(float(same))
    own = language.compare(model, dsa, dsa, ids, TOP_K)
    assert own["kl"] == 0 and own["top1"] == 1


def test_comparison_goes_on(model, indexers, windows, tmp_path, monkeypatch):
    short = longbench.TASKS["qasper"]._replace(tokens=3)
    monkeypatch.setitem(longbench.TASKS, "qasper", short)
    path, said = tmp_path / "language.json", []
    sample = Sample([windows[0], windows[1]], [0, 1])
    prompts = [Prompt("qasper", str(i), "abcdefgh" * 3, ["aa"], []) for i in range(2)]
    labels = ["misa:h=2", "recency"]
    settings = {"step": 1, "length": 25, "top_k": TOP_K}

    def run(seconds=math.inf, settings=settings):
        given = (model, Letters(None), indexers, sample, prompts, labels, path, settings)
        language.measure(*given, seconds=seconds, say=said.append)
        return json.loads(path.read_text())

    first = run(seconds=0)
    assert len(said) == 1 and [one["label"] for one in first["text"]] == ["dsa"]
    whole = run()
    assert len(said) == 1 + 4 * 4 - 1
    assert run() == whole and len(said) == 4 * 4
    by_label = {one["label"]: one for one in whole["text"]}
    assert list(by_label) == ["dsa", "dense", *labels]
    assert by_label["dsa"]["kl"] == [0, 0, 0] and by_label["dsa"]["loss_over_dsa"] == [0, 0, 0]
    assert all(by_label[label]["kl"][0] > 0 for label in ("dense", *labels))
    for one in whole["text"]:
        over = one["loss"][0] - by_label["dsa"]["loss"][0]
        assert one["loss_over_dsa"][0] == pytest.approx(over)
        assert (one["windows"], one["documents"]) == (2, 2)
    said_by = {label: one["answer"] for label, one in whole["answers"]["qasper/0"].items()}
    assert all(len(text) == 3 for text in said_by.values())
    for one in whole["prompts"]:
        assert one["prompts"] == one["tasks"]["qasper"]["prompts"] == 2
    assert len(language.table(whole).splitlines()) == 10
    with pytest.raises(ValueError, match="expected the settings"):
        run(settings={**settings, "step": 2})
