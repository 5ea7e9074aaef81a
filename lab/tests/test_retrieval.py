# SPDX-License-Identifier: Apache-2.0
"""Where gold spans are, what is counted as found, and a measurement that goes on."""

import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lab import decoder, gold, indexer, longbench, retrieval, sparse, tasks  # noqa: E402
from lab.statistics import share  # noqa: E402
from lab.trained import Sample  # noqa: E402

LENGTH = 192


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A decoder of random weights that prefers some tokens to others, and its indexers."""
    model = decoder.new(decoder.Shape(2, 128, 400), 0).eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(8)
        layer.self_attn.k_proj.weight.mul_(8)
    torch.manual_seed(1)
    nothing = tmp_path_factory.mktemp("none")
    return model, indexer.load(nothing, indexer.Shape(2, 128, 16, 16))


@pytest.fixture(scope="module")
def cases(tokenizer, tokens):
    windows = [torch.from_numpy(one[:LENGTH].astype(np.int64)) for one in tokens[:2]]
    maker = tasks.Maker(tokenizer)
    return list(retrieval.synthetic(maker, Sample(windows, [5, 7]), LENGTH, depths=2))


def test_cases(cases, tokenizer):
    assert [one.name for one in cases[:4]] == ["needle-0/0", "needle-1/0", "needles/0", "list/0"]
    assert len({one.name for one in cases}) == len(cases) == 8
    assert [len(one.asked) for one in cases[:4]] == [1, 1, 2, retrieval.LINES]
    for one in cases:
        for asked, question in zip(one.asked, one.example.questions, strict=True):
            assert one.example.ids[asked.row + 1] == one.example.ids[asked.places[0]]
            assert asked.row + 1 == question.answer[0] and asked.places[0] == question.value[0]
    middle = cases[0].asked[0].depth, cases[1].asked[0].depth
    assert middle[0] < 0.45 < middle[1]


def test_found_by_hand(small, cases):
    """Of everything a row finds all, of the last positions what is near it."""
    model, indexers = small
    one = cases[3]
    last = 60
    choices = [sparse.choice("dsa", LENGTH), sparse.choice("recency", last)]
    answers, attention, selected = retrieval.dense(model, indexers, one, choices)
    assert len(answers) == len(attention) == retrieval.LINES
    assert all(pair == [1, 1] for row in selected["dsa"] for pair in row)
    hits = 0
    for asked, row in zip(one.asked, selected["recency"], strict=True):
        first = asked.row - last + 1
        ((start, end),) = asked.facts
        part = sum(position >= first for position in range(start, end)) / (end - start)
        found = float(asked.places[0] >= first)
        assert row == [[found, pytest.approx(part)]] * 2
        hits += found
    assert 0 < hits < retrieval.LINES

    model.set_attn_implementation("eager")
    ids = torch.from_numpy(one.example.ids)[None]
    whole = model.model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for asked, seen in zip(one.asked, attention, strict=True):
        expected = [
            layer[0, :, asked.row, slice(*asked.facts[0])].sum(-1).mean() for layer in whole
        ]
        assert seen == pytest.approx([float(x) for x in expected], abs=1e-5)


def test_measurement_goes_on(small, cases, tmp_path):
    path, settings = tmp_path / "r.json", {"top_k": LENGTH, "depths": 2}
    given = (*small, cases, ["dsa", "recency"], path, settings)
    said: list[str] = []
    stopped = retrieval.measure(*given, seconds=0, say=said.append)
    assert len(said) == 1 and said[0].startswith("1 of 24 passes")
    assert [one["label"] for one in stopped["results"]] == ["dense", "dsa", "recency"]
    state = retrieval.measure(*given, say=said.append)
    assert len(said) == 24 and json.loads(path.read_text()) == json.loads(json.dumps(state))
    assert len(state["results"]) == 9
    for one in state["cases"].values():
        for question in one["questions"]:
            exact, log_probability = question["answers"]["dense"]
            # Everything is selected, so that nothing is lost.
            assert question["answers"]["dsa"] == [exact, pytest.approx(log_probability, abs=1e-3)]
    assert len(retrieval.table(state["results"]).splitlines()) == 10
    retrieval.measure(*given, say=said.append)
    assert len(said) == 24
    with pytest.raises(ValueError, match="expected the settings"):
        retrieval.measure(*given[:-1], {"top_k": 9, "depths": 2})


def test_summary_by_hand():
    def question(depth, exact, found, attention):
        return {
            "depth": depth,
            "answers": {"dense": [exact, -1.0 if exact else -5.0]},
            "selected": {"dsa": [[found, 0.5], [1.0, 1.0]]},
            "attention": attention,
        }

    kept = [
        {"document": "a", "questions": [question(0.1, True, 0.0, [0.3, 0.0])]},
        {"document": "a", "questions": [question(0.2, False, 1.0, [0.5, 0.2])]},
        {"document": "b", "questions": [question(0.9, True, 1.0, [0.0, 0.0])]},
    ]
    kept = [{"kind": "needle", **one} for one in kept]
    dense, dsa = retrieval.summary(kept, ["dense", "dsa"], 2)
    assert "selection" not in dense and "answers" not in dsa
    answers, selection = dense["answers"], dsa["selection"]
    assert (answers["contexts"], answers["documents"], answers["questions"]) == (3, 2, 3)
    # And a, with 1 and 0, and b, with 1.
    assert answers["exact"] == pytest.approx((2 / 3, 1 / 2, 1))
    # Drawn again are a, with -1 and -5, and b, with -1.
    assert answers["log_probability"] == pytest.approx((-7 / 3, -3, -1))
    assert [(d["depth"], d["count"], d["share"][0]) for d in answers["by_depth"]] == [
        (0.25, 2, 0.5),
        (0.75, 1, 1.0),
    ]
    assert selection["found"][0] == pytest.approx((0.5 + 1 + 1) / 3)
    assert selection["looked"] == 3  # twice in layer 0, once in layer 1
    # The means of the two questions that a layer looks at are 0 and 1, both of one document.
    assert selection["found_where_looked"] == pytest.approx((0.5, 0.5, 0.5))
    # The first half's questions were found in 1 of 2 layers and in both; the other half's in both,
    # one question of one document.
    early, late = selection["by_depth"]
    assert (early["count"], early["share"]) == (2, pytest.approx((0.75, 0.75, 0.75)))
    assert (late["count"], late["share"]) == (1, (1, 1, 1))
    first, second = selection["by_layer"]
    assert first["found"][0] == pytest.approx(2 / 3) and second["found"][0] == 1
    assert first["attention"] == pytest.approx(0.8 / 3) and first["of_facts"] == 0.5


def test_layers_are_not_independent():
    """Two questions, of which one is found in all of 50 layers, the other in none."""
    kept = [
        {
            "kind": "needle",
            "document": document,
            "questions": [
                {
                    "depth": 0.5,
                    "answers": {},
                    "selected": {"dsa": [[found, found]] * 50},
                    "attention": [0.2] * 50,
                }
            ],
        }
        for document, found in (("a", 1.0), ("b", 0.0))
    ]
    (found,) = retrieval.summary(kept, ["dsa"], 1)
    # A layer by itself has one trial for each document.
    assert found["selection"]["by_layer"][0]["found"] == share(1, 2)
    # Drawn again are a twice, b twice, or both.
    assert found["selection"]["found_where_looked"] == (0.5, 0, 1)
    assert found["selection"]["looked"] == 100
    (depth,) = found["selection"]["by_depth"]
    assert depth == {"depth": 0.5, "count": 2, "share": (0.5, 0, 1)}


def test_gold_by_hand(tokenizer):
    context = "Question: 12? The code of abcd is 12.\nNobody is Ann Lee, or annlee.\nann lee is."
    text = context + "\nQuestion: who is Ann Lee?"
    prompt = longbench.Prompt("hotpotqa", "0", text, ["no", "zzzz", "Ann Lee"], [])
    found = gold.found(prompt, tokenizer)
    parts = [text.index("Ann Lee"), text.index("ann lee is")]
    for place, start in zip(found.places, parts, strict=True):
        before = tokenizer.decode(found.ids[:place])
        assert before.strip() == text[:start].strip()
    lines = [tokenizer.decode(found.ids[slice(*span)]).strip() for span in found.facts]
    assert lines == ["Nobody is Ann Lee, or annlee.", "ann lee is."]
    assert tokenizer.decode(found.ids[slice(*found.answer)]) == " Ann Lee"
    assert gold.found(prompt._replace(gold=["no", "zzzz"]), tokenizer) is None
    assert gold.found(prompt._replace(gold=["who is"]), tokenizer) is None  # only asked

    text = "Paragraph 1: one.\n\nParagraph 2: two.\n\nSay Paragraph 1 or Paragraph 2. It is: "
    prompt = longbench.Prompt("passage_retrieval_en", "0", text, ["Paragraph 2"], [])
    found = gold.found(prompt, tokenizer)
    assert len(found.places) == 1
    assert tokenizer.decode(found.ids[slice(*found.facts[0])]).strip() == "Paragraph 2: two."
    assert tokenizer.decode(found.ids[slice(*found.answer)]) == "Paragraph 2"

    before = found.answer[0]
    whole = retrieval.of_prompts([prompt], tokenizer, 500, before - 1)
    assert whole[0].asked[0].row == found.answer[0] - 1 and whole[0].kind == prompt.task
    assert retrieval.of_prompts([prompt], tokenizer, 20, 8) == []
    assert retrieval.of_prompts([prompt], tokenizer, 500, before) == []


def test_needles_alone_differ_by_depth_only_in_place(tokenizer, tokens):
    maker, haystack = tasks.Maker(tokenizer), tokens[0][:LENGTH]
    made = [
        tasks.needles(maker, haystack, LENGTH, [depth], random.Random(5)) for depth in (0.2, 0.8)
    ]
    facts = [one.ids[slice(*one.questions[0].fact)].tolist() for one in made]
    assert facts[0] == facts[1]
    kept = [one.ids[one.roles == tasks.TEXT].tolist() for one in made]
    assert kept[0] == kept[1]
