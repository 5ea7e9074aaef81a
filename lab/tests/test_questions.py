# SPDX-License-Identifier: Apache-2.0
"""Questions to traces: the parts by hand, planted cases, and all of them on tiny traces."""

import json
import math
import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for needed in ("transformers", "matplotlib", "safetensors"):
    pytest.importorskip(needed)

import misa  # noqa: E402
from lab.questions import __main__ as program  # noqa: E402
from lab.questions import answers, page, rare, reuse, routing, trace, values  # noqa: E402
from lab.questions.trace import Trace  # noqa: E402

KEYS, ROWS, HEADS, DIM, TOP_K = 1100, 16, 16, 64, 32


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(q, w, k, ke, name="made", source="a text", attention=None) -> Trace:
    ke = torch.as_tensor(ke, dtype=torch.int32)
    attention = torch.zeros(0, len(k)) if attention is None else attention
    return Trace(name, "a model", source, q, w, k, None, torch.zeros_like(ke), ke, attention)


def random_trace(seed=0, name="random") -> Trace:
    """Keys that have a common side, as trained ones do."""
    draws = torch.Generator().manual_seed(seed)
    k = torch.randn(KEYS, DIM, generator=draws)
    k[:, 0] = 3 + k[:, 0].abs()
    q = torch.randn(ROWS, HEADS, DIM, generator=draws)
    w = torch.randn(ROWS, HEADS, generator=draws)
    attention = torch.rand(ROWS, KEYS, generator=draws)
    ke = range(KEYS - ROWS + 1, KEYS + 1)
    return made(q.bfloat16(), w, k.bfloat16(), ke, name, attention=attention)


def test_shares_by_hand():
    wanted = np.array([[0, 1, 2, 3], [4, 5, -1, -1], [-1, -1, -1, -1]])
    found = np.array([[3, 2, 9], [5, 9, 8], [0, 1, 2]])
    np.testing.assert_equal(trace.shares(wanted, found), [0.5, 0.5, np.nan])
    attention = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]])
    one = made(torch.zeros(2, 1, DIM), torch.zeros(2, 1), torch.zeros(10, DIM), [9, 10],
               attention=attention)  # fmt: skip
    kept = trace.attended(one, np.array([[0, 1], [0, 1]]), np.array([[0, 1], [1, 2]]))
    np.testing.assert_allclose(kept, [np.nan, 0.3 / 0.7])


def test_blocks_by_hand():
    ends = [100, 300, 301, 309, 318, *range(400, 410)]
    one = made(torch.zeros(15, 1, DIM), torch.zeros(15, 1), torch.zeros(500, DIM), ends)
    numbers = trace.blocks(one)
    assert numbers.tolist() == [0, 1, 1, 1, 2] + [3] * 8 + [4] * 2
    found = np.array([1.0, 2, 4, np.nan, np.nan, *range(8), np.nan, 6])
    assert trace.of_blocks(found, numbers).tolist() == [1, 3, 3.5, 6]
    assert answers.summary(np.full(15, 0.25), numbers) == [0.25, 0.25, 0.25]
    assert [run.tolist() for run in routing.runs(one)] == [list(range(5, 13))]


def test_values_by_hand():
    left, slope = values.rest(torch.tensor([[-1.0, 0.0, 1.0], [1.0, 2.0, 6.0], [2.0, 2.0, 2.0]]))
    assert left.tolist() == pytest.approx([math.sqrt(6 / 108), 0, 0], abs=1e-6)
    assert slope.tolist() == pytest.approx([0.5, 1, 0])
    k = torch.zeros(4, DIM)
    k[:, 0] = torch.tensor([2.0, -4.0, 0.0, 2.0])
    q = torch.zeros(1, 2, DIM)
    q[0, 0, 0], q[0, 1, 0] = 1, -1
    found = values.over_keys(made(q, torch.tensor([[2.0, -3.0]]), k, [4]))
    np.testing.assert_allclose(found["energy"], [[2, 3]])
    np.testing.assert_allclose(found["dispersion"], [[2, 3 * math.sqrt(3)]])
    np.testing.assert_allclose(found["fires"], [[0.5, 0.25]])
    np.testing.assert_allclose(found["self"], [[4, 0]])
    one = made(q, torch.tensor([[2.0, -3.0]]), k.repeat_interleave(64, 0), [256])
    means = values.of_means(one, 64)
    np.testing.assert_allclose(means["signed"], [[2, -3]])
    np.testing.assert_allclose(means["pooled"], [[2, 3]])
    np.testing.assert_allclose(means["deviation"], [[2, 3 * math.sqrt(3)]])
    blocks = values.block_statistics(one)
    np.testing.assert_allclose(blocks["max", 256], [[4, 12]])
    np.testing.assert_allclose(blocks["norm", 256], [[2 * math.sqrt(2), 6]], rtol=1e-6)


def test_lists_are_those_of_the_package():
    one = random_trace()
    never = one.q.clone()
    never[:, ::2, 0] = -40  # half the heads fire on no key
    one = replace(one, q=never, k=30 * one.k)
    asked = {
        "nonlinearity": routing.nonlinearity(one),
        "pooled": values.of_means(one, 1024)["pooled"],
    }
    for router, ranked in asked.items():
        config = misa.Config("misa", router=router, heads=3, top_k=TOP_K)
        theirs = trace.routed(one, config)
        lists = trace.largest(ranked, 3)
        assert [sorted(mine) for mine in lists] == theirs.tolist(), router
        given = trace.select_given(one, lists, "misa", top_k=TOP_K)
        assert np.array_equal(np.sort(given), np.sort(trace.select(one, config))), router


def test_scores_and_pools():
    one = random_trace()
    scores = trace.scores_of(one)
    assert scores.shape == (ROWS, KEYS) and np.isinf(scores[0, int(one.ke[0]) :]).all()
    best = np.argsort(-scores, 1, kind="stable")[:, :TOP_K]
    assert trace.shares(best, routing.dsa(one, TOP_K)).tolist() == [1] * ROWS
    pool = np.array([[4, 0, 2, -1, 2]])
    found = trace.best_of(pool, np.array([[1.0, 9, 3, 9, 2]]), 2)
    assert found.tolist() == [[2, 4]]
    assert reuse.last(one.rows(np.arange(ROWS) == 0), 3).tolist() == [
        [KEYS - ROWS, KEYS - ROWS - 1, KEYS - ROWS - 2]
    ]


def test_energy_misleads_and_dispersion_does_not():
    """Two loud heads say the same of every key, two quiet ones tell keys apart: the best are the
    last, and without them the first are taken."""
    k = torch.zeros(1000, DIM)
    k[:, 0] = 1
    k[:, 1] = torch.arange(1000) / 1000
    q = torch.zeros(1, 4, DIM)
    q[0, :2, 0] = 10
    q[0, 2:, 1] = 1
    one = made(q, torch.ones(1, 4), k, [1000])
    found = answers.Answers()
    routing.criteria([one], TOP_K, found)
    kept = {
        series: by_x[2].tolist()
        for (measure, _, series), by_x in found.values.items()
        if measure == f"{routing.WITHOUT}: {answers.RECALL}"
    }
    assert kept["energy, all keys"] == kept["energy of block means (pooled)"] == [0]
    assert kept["dispersion, all keys"] == kept["dispersion, 128 keys"] == [1]


def test_adaptive_lists_by_hand():
    ranked = np.array([[1.0, 4, 2, 3], [10, 0, 0, 0]])
    assert [x.tolist() for x in routing.smallest(ranked, 0.7)] == [[1, 3], [0]]
    assert [x.tolist() for x in routing.smallest(ranked, 0.71)] == [[1, 3, 2], [0]]
    lists = routing.spending(ranked, np.array([0, 1]), 2)
    assert [len(x) for x in lists] == [3, 1]


def test_planted_heads(monkeypatch):
    monkeypatch.setattr(rare, "EVERY", 250)
    one = random_trace()
    planted, owed = rare.plant(one, 0.5, TOP_K)
    head = int((planted.q.float() - one.q.float()).abs().sum((0, 2)).argmax())
    fires = values.over_keys(planted)["fires"][:, head]
    assert set((fires * planted.seen).round().tolist()) in ({4}, {5})  # one key in 250
    assert (owed >= 0).sum(1).max() >= 4 and (owed[owed >= 0] % 2 == 1).all()
    kept = {}
    parts = values.of_sample(planted)
    assert (parts["rest"][:, head] == 0).all()
    for gamma in (0, 1000):
        lists = trace.largest(parts["rest"] + gamma * parts["chance"], 3)
        found = trace.select_given(planted, lists, "misa-r", top_k=TOP_K)
        kept[gamma] = np.nanmean(trace.shares(owed, found))
        assert all((head in heads) == (gamma > 0) for heads in lists)
    assert kept[0] < 0.2 and kept[1000] > 0.9
    # Keys of no common side allow no such head.
    assert rare.plant(replace(one, k=torch.randn(KEYS, DIM).bfloat16()), 0.5, TOP_K) is None


def test_without_and_missing():
    wanted = np.array([[3, 1, 2], [5, -1, -1]])
    assert trace.missing(wanted, np.array([[1, 9], [5, 0]])).tolist() == [[3, -1, 2], [-1, -1, -1]]
    one = random_trace()
    silent = np.zeros((ROWS, HEADS), bool)
    silent[:, 2:] = True
    given = trace.select_given(one, [np.array([0, 1])] * ROWS, "misa", top_k=TOP_K)
    found = routing.dsa(rare.without(one, silent), TOP_K)
    assert trace.shares(given, found).tolist() == [1] * ROWS


def test_another_step_and_layer():
    one = random_trace()
    same = replace(one, q=one.q[:1].repeat(ROWS, 1, 1), w=one.w[:1].repeat(ROWS, 1))
    found = answers.Answers()
    reuse.previous([same], TOP_K, found)
    kept = found.values[answers.RECALL, one.name, "the best k of the earlier step"]
    assert list(kept) == [1, 2, 4, 8]
    assert (answers.FAR, one.name, "the last 2 k positions") in found.values
    for lag, by_row in kept.items():
        assert np.isnan(by_row[:lag]).all() and (by_row[lag:] == 1).all()
    # Where later keys are better, the positions since are all that the earlier step lacks.
    query = torch.zeros_like(one.q)
    query[:, :, 0] = 1
    found = answers.Answers()
    rising = replace(one, q=query.float(), w=one.w.abs(), k=one.k.float())
    rising.k[:, 0] = torch.arange(KEYS) / KEYS
    reuse.previous([rising], TOP_K, found)
    kept = found.values[answers.RECALL, one.name, "the best k of the earlier step"]
    assert all(np.nanmin(by_row) == 1 for by_row in kept.values())
    assert (answers.FAR, one.name, "the last 2 k positions") not in found.values
    found = answers.Answers()
    reuse.layers([one, replace(one, name="twin"), replace(one, name="other", source="")], TOP_K,
                 found)  # fmt: skip
    assert (found.values[answers.RECALL, one.name, "the best of twin"][1] == 1).all()
    assert not any("other" in key[1] or "other" in key[2] for key in found.values)
    assert found.notes == ["other: no other trace names the same source"]


def test_shortened_and_rounded_rows():
    one = random_trace()
    short = reuse.shortened(one, 200)
    assert short.seen.tolist() == [200] * ROWS and torch.equal(short.ke, one.ke)
    assert reuse.shortened(one, 5000).seen.tolist() == one.seen.tolist()
    # Positions count from the first key that a row sees.
    whole, first = trace.scores_of(one), one.ke.numpy() - 200
    for t, row in enumerate(trace.scores_of(short)):
        np.testing.assert_allclose(row, whole[t, first[t] : first[t] + 200], rtol=1e-5, atol=1e-5)
    wanted = routing.dsa(one, TOP_K)
    kept = trace.shares(wanted, routing.dsa(reuse.quantised(one), TOP_K))
    assert 0.8 < kept.mean() < 1
    found = answers.Answers()
    reuse.sketches([one], found, TOP_K, scaled=False)
    assert found.values == {}  # no length that is asked about is so short


def test_differences_are_by_row():
    one = random_trace()
    found = answers.Answers()
    by_row = np.linspace(0, 0.5, ROWS)
    found.add("m", one, "base", 1, by_row)
    found.add("m", one, "better", 1, by_row + 0.25)
    point = found.measures("base")["m"]["random"]["better"][0]
    assert point[0] == 1 and point[1] == pytest.approx(0.5, abs=1e-3)
    assert point[2] < point[1] < point[3] and point[4:] == [0.25, 0.25, 0.25]
    assert page.mark(point) == " ▲" and page.mark([*point[:4], -1, -2, -0.1]) == " ▼"
    assert page.mark([*point[:4], 0, -1, 1]) == "" == page.mark(point[:4])


def test_all_questions_and_their_page(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    paths = []
    for layer in (1, 2):
        one = random_trace(layer)
        path = tmp_path / f"trace_layer{layer}.safetensors"
        tensors = {"q": one.q, "w": one.w, "k": one.k, "ks": one.ks, "ke": one.ke}
        save_file({**tensors, "attn_last32": one.attention}, path, metadata={"source": "a text"})
        paths.append(str(path))
    out, written = tmp_path / "out", tmp_path / "page.md"
    monkeypatch.setattr(routing, "HEADS", (2, 8))
    monkeypatch.setattr(rare, "GAMMAS", (0, 0.1))
    monkeypatch.setattr(reuse, "LENGTHS", (512, 1024))
    monkeypatch.setattr(sys, "argv", ["questions", *paths, "--out", str(out), "--top-k", "32",
                                      "--page", str(written)])  # fmt: skip
    assert program.main() == 0
    text = written.read_text()
    for name, question in program.QUESTIONS.items():
        answer = json.loads((out / f"{name}.json").read_text())
        assert f"## {question.title}" in text and f"(out/{name}.svg)" in text
        ElementTree.parse(out / f"{name}.svg")
        assert answer["measures"], name
        for measure, by_trace in answer["measures"].items():
            assert set(by_trace) == {"layer1", "layer2"}, (name, measure)
            for series in by_trace.values():
                for points in series.values():
                    for x, mean, low, high, *difference in points:
                        assert x in answer["xs"] and len(difference) in (0, 3)
                        assert 0 <= low <= mean + 1e-4 <= high + 2e-4
                    if name.startswith("sketch"):  # more candidates never lose one
                        means = [point[1] for point in points]
                        assert means == sorted(means) and means[-1] > 0.9, (name, measure)
        assert any(page.points_at(answer, m) for m in answer["measures"]), name


def test_traces_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"q": torch.zeros(1, 1, DIM)}, path)
    with pytest.raises(ValueError, match="got none called w"):
        trace.load(path)
    save_file({"q": torch.zeros(2, 1, DIM), "w": torch.zeros(2, 1), "k": torch.zeros(9, DIM)}, path)
    asked = {"1": "different names", "9": "more than 9 keys"}
    for top_k, expected in asked.items():
        monkeypatch.setattr(sys, "argv", ["questions", str(path), str(path), "--out", str(tmp_path),
                                          "--top-k", top_k])  # fmt: skip
        with pytest.raises(SystemExit):
            program.main()
        assert re.search(expected, capsys.readouterr().err)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here")
    absent = tmp_path / "absent"
    for wrong, expected in ((text, "expected a safetensors file"), (absent, "No such file")):
        monkeypatch.setattr(sys, "argv", ["questions", str(wrong), "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            program.main()
        assert re.search(expected, capsys.readouterr().err)
    one = trace.load(path)
    assert one.ks.tolist() == [0, 0] and one.ke.tolist() == [8, 9] and len(one.attention) == 0
