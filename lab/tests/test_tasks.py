# SPDX-License-Identifier: Apache-2.0
"""Examples worked by hand: where facts sit, and that the right answer is in the text."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lab import tasks  # noqa: E402

HAYSTACK = np.arange(1000, 1400)


@pytest.fixture(scope="module")
def maker(tokenizer):
    return tasks.Maker(tokenizer)


def test_compose_by_hand():
    pieces = [
        tasks.Piece(0.5, [1, 2, 3], (1, 3)),
        tasks.Piece(0.25, [4, 5], (1, 2)),
        tasks.Piece(1.0, [1, 2, 3], (1, 3), asks=0),
        tasks.Piece(0.25, [6], (0, 1)),
    ]
    made = tasks.compose(np.arange(100, 120), pieces, 17)  # 8 tokens of the haystack
    expected = [100, 101, 4, 5, 6, 102, 103, 1, 2, 3, 104, 105, 106, 107, 1, 2, 3]
    assert made.ids.tolist() == expected
    assert made.roles.tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2]
    assert made.questions == [tasks.Question((7, 10), (8, 10), (15, 17))]
    with pytest.raises(ValueError, match="expected room for 0 to 20 tokens, got -2"):
        tasks.compose(np.arange(20), pieces, 7)
    with pytest.raises(ValueError, match="got 21"):
        tasks.compose(np.arange(20), [], 21)
    with pytest.raises(ValueError, match="expected to ask for an earlier one"):
        early = pieces[2]._replace(place=0.2, asks=1)
        tasks.compose(np.arange(20), [early, pieces[0]], 10)


def test_a_needle_is_a_sentence(maker, tokenizer):
    made = tasks.needles(maker, HAYSTACK, 120, [0.5], random.Random(1))
    (asked,) = made.questions
    text = tokenizer.decode(made.ids[slice(*asked.fact)])
    words = text.split()
    assert words[:3] == ["The", "code", "of"] and words[5] == "is" and text.endswith(".\n")
    assert tokenizer.decode(made.ids[slice(*asked.value)]) == words[6].rstrip(".")
    end = tokenizer.decode(made.ids[asked.answer[0] - 30 :])
    assert end.endswith(text.removesuffix(".\n"))
    # As the tokenizer itself has it, so that text from elsewhere is not another language.
    assert tokenizer(text)["input_ids"] == made.ids[slice(*asked.fact)].tolist()


def test_needles_sit_at_their_depths(maker):
    made = tasks.needles(maker, HAYSTACK, 300, [0.75, 0.25], random.Random(1), others=3)
    room = sum(made.roles == tasks.TEXT)
    for asked, depth in zip(made.questions, (0.75, 0.25), strict=True):
        before = made.ids[: asked.fact[0]] >= 1000
        assert before.sum() == int(depth * room)
    assert made.questions[0].answer < made.questions[1].answer
    assert made.questions[1].answer[1] == 300


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_in_the_text(maker, seed):
    choice = random.Random(seed)
    made = [
        tasks.needles(maker, HAYSTACK, 256, [0.1, 0.6], choice),
        tasks.listed(maker, HAYSTACK, 256, 4, choice),
        *(tasks.mixed(maker, HAYSTACK, 300, choice) for _ in range(10)),
    ]
    assert len(made[1].questions) == 4
    assert sum(len(example.questions) for example in made[2:]) > 10
    for example in made:
        ids = example.ids
        for fact, value, answer in example.questions:
            assert fact[0] <= value[0] < value[1] <= fact[1] <= answer[0]
            assert ids[slice(*value)].tolist() == ids[slice(*answer)].tolist()
            before = value[0] - fact[0]
            name = ids[fact[0] : value[0]].tolist()
            assert before and ids[answer[0] - before : answer[0]].tolist() == name
            if before == 2:
                continue  # a copy, whose first words may be elsewhere
            # Nothing else in front of the answer has that name.
            whole = ids[: answer[0] - before].tolist()
            places = [i for i in range(len(whole)) if whole[i : i + before] == name]
            assert all(ids[i + before] == ids[value[0]] for i in places) and fact[0] in places
        learned = sum(slice(*q.answer).stop - slice(*q.answer).start for q in example.questions)
        assert (example.roles == tasks.ANSWER).sum() == learned


def test_answered_by_hand(maker):
    """A model that says after every token the one behind the same token's first place."""
    made = tasks.needles(maker, HAYSTACK, 100, [0.5], random.Random(3))
    ids = made.ids.tolist()

    class Model(torch.nn.Module):
        def __init__(self, wrong: bool):
            super().__init__()
            self.one = torch.nn.Parameter(torch.zeros(1))
            self.wrong = wrong
            self.lm_head = torch.nn.Identity()

        def model(self, given, use_cache):
            class Found:
                last_hidden_state = torch.zeros(1, 100, 1400)

            (first, end) = made.questions[0].answer
            for place in range(first - 1, end - 1):
                Found.last_hidden_state[0, place, given[0, place + 1]] = 1 - 2 * self.wrong
            return Found

    chance = np.exp(1) / (np.exp(1) + 1399)
    (found,) = tasks.answered(Model(wrong=False), made)
    assert found.exact and found.log_probability == pytest.approx(5 * np.log(chance), rel=1e-4)
    assert not tasks.answered(Model(wrong=True), made)[0].exact
    assert len(ids) == 100


def test_a_tokenizer_without_words_is_refused(tokenizer):
    class Poor:
        def get_vocab(self):
            return {"0": 0, "Ġword": 1}

    with pytest.raises(ValueError, match="expected 16 words and 10 digits as tokens, got 1 and 1"):
        tasks.Maker(Poor())
