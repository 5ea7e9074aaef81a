# SPDX-License-Identifier: Apache-2.0
"""Selected positions by hand, and attention to them on a tiny random model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import LENGTH, VOCABULARY  # noqa: E402

from lab import base, indexer, sparse  # noqa: E402

TOP_K = 8


@pytest.fixture(scope="module")
def indexers(tmp_path_factory):
    torch.manual_seed(5)
    return indexer.load(tmp_path_factory.mktemp("none"), indexer.Shape(2, 128, 16, 16))


def logits(model, indexers, chosen, ids):
    with sparse.attending(model, indexers, chosen):
        return model(ids[None]).logits[0]


def test_notation():
    assert sparse.choice("dsa", 8).config.indexer == "dsa"
    sketched = sparse.choice("misa-r:h=3:m=4k:sketch=2:fp8", 16)
    config = sketched.config
    assert (config.heads, config.candidates, config.sketch, sketched.fp8) == (3, 64, 2, True)
    assert not sparse.choice("misa:h=4", 8).fp8
    for wrong in ("dsa:m=x", "misa-r:m=4k:sketch=2", "recent"):
        with pytest.raises(ValueError, match="expected"):
            sparse.choice(wrong, 8)


def test_rounding_keeps_values():
    x = torch.randn(5, 128) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 5.0])[:, None]
    values, scale = sparse.rounded(x)
    error = (values.float() * scale[:, None] - x).abs()
    assert (error <= x.abs() / 16 + scale[:, None] / 128).all()


def test_plain_choices_by_hand():
    rows, k = torch.tensor([1, 4]), torch.zeros(5, 128)
    nothing = torch.zeros(2, 8, 128), torch.zeros(2, 8)
    got = sparse.positions(sparse.choice("recency", 3), *nothing, k, rows)
    assert got.tolist() == [[1, 0, -1], [4, 3, 2]]
    got = sparse.positions(sparse.choice("random", 3), *nothing, k, rows, seed=1)
    assert sorted(got[0].tolist()) == [-1, 0, 1]
    assert len(set(got[1].tolist())) == 3 and got[1].min() >= 0
    many = [
        sparse.positions(sparse.choice("random", 3), *nothing, k, rows, seed=s)[1] for s in range(9)
    ]
    assert set(torch.cat(many).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("label", ["dsa", "misa-r:h=3:m=4k", "dsa:fp8", "recency", "random"])
def test_everything_selected_is_dense(model, indexers, windows, label, monkeypatch):
    monkeypatch.setattr(sparse, "ROWS", 40)
    dense = model(windows[0][None]).logits[0]
    assert torch.equal(logits(model, indexers, None, windows[0]), dense)
    chosen = sparse.choice(label, LENGTH)
    torch.testing.assert_close(logits(model, indexers, chosen, windows[0]), dense)


@pytest.mark.parametrize("label", ["dsa", "recency"])
def test_attention_is_to_the_selected_alone(model, indexers, windows, label, monkeypatch):
    """The first layer's output by the formula; dense, it would be another."""
    monkeypatch.setattr(sparse, "ROWS", 40)
    seen, chosen = {}, torch.zeros(LENGTH, LENGTH, dtype=torch.bool)

    def selected(i, rows, got):
        if i == 0:
            for row, positions in zip(rows.tolist(), got.tolist(), strict=True):
                chosen[row, [p for p in positions if p >= 0]] = True

    def see(i, module, *inputs):
        seen[i] = inputs

    outputs = {}
    first = model.model.layers[0].self_attn
    handle = first.register_forward_hook(lambda *call: outputs.update(sparse=call[2][0][0]))
    entry = sparse.choice(label, TOP_K)
    with sparse.attending(model, indexers, entry, selected), base.watched(model, see):
        model(windows[0][None])
    handle.remove()
    assert chosen.sum(1).tolist() == [min(row + 1, TOP_K) for row in range(LENGTH)]
    hidden, cos, sin = seen[0]
    rows = torch.arange(LENGTH)
    q, w, k = indexers[0](hidden, cos, sin, rows)
    if label == "dsa":
        scores = indexer.scores(q.bfloat16().float(), w, k.bfloat16().float())
        scores.masked_fill_(rows > rows[:, None], float("-inf"))
        best = torch.zeros_like(chosen).scatter_(1, scores.topk(TOP_K).indices, True)
        assert (best & chosen).sum() / chosen.sum() > 0.98  # but for ties and rounding
    else:
        assert torch.equal(chosen, (rows <= rows[:, None]) & (rows > rows[:, None] - TOP_K))
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill_(~chosen, float("-inf"))
    model.set_attn_implementation("eager")
    expected = first(hidden[None], position_embeddings=(cos[None], sin[None]), attention_mask=mask)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(outputs["sparse"], expected[0][0])


def test_pieces_are_the_whole(model, indexers, windows):
    entry = sparse.choice("misa-r:h=3:m=4k", TOP_K)
    ids = windows[0]
    whole = logits(model, indexers, entry, ids)
    with sparse.attending(model, indexers, entry):
        model(windows[1][None])  # another sequence leaves nothing behind
        out = model(ids[None, :50], use_cache=True)
        rest = model(ids[None, 50:], cache=out.cache)
        made = model.generate(ids[None, :50], max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(out.logits[0], whole[:50])
    torch.testing.assert_close(rest.logits[0], whole[50:])
    again = ids[:50]
    for _ in range(4):
        again = torch.cat([again, logits(model, indexers, entry, again)[-1].argmax()[None]])
    assert made[0].tolist() == again.tolist()
    assert int(made.max()) < VOCABULARY


def test_the_model_is_left_as_it_was(model, indexers, windows):
    dense = model(windows[0][None]).logits
    with pytest.raises(ValueError, match="expected one sequence a call, got 2"):
        with sparse.attending(model, indexers, sparse.choice("dsa", TOP_K)):
            model(windows[0].expand(2, -1))
    assert torch.equal(model(windows[0][None]).logits, dense)
