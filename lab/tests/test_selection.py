# SPDX-License-Identifier: Apache-2.0
"""Shares by hand, and the comparison on a tiny random model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lab import indexer, selection, sparse  # noqa: E402
from lab.trained import Sample, asking, seen  # noqa: E402

TOP_K = 8


def test_shares_by_hand():
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.4, 0.4]])
    dsa = torch.tensor([[0, 1], [2, 3]])
    assert selection.shares(dsa, dsa, attention) == (1.0, 1.0)
    recall, kept = selection.shares(torch.tensor([[0, 3], [1, 0]]), dsa, attention)
    assert recall == 0.25
    assert kept == pytest.approx((0.5 / 0.7 + 0.2 / 0.8) / 2)


def test_rows_of_the_last_eighth_ask():
    assert [seen(8192, k) for k in (512, 7168, 7200)] == [7169, 7169, 7201]
    # 4 of 32 rows, of which the first sees 29 keys; where 30 are selected, those that see more.
    assert asking(32, seen(32, 8), 9, number=0).tolist() == [28, 29, 30, 31]
    assert asking(32, seen(32, 30), 9, number=0).tolist() == [30, 31]
    some = asking(8192, seen(8192, 512), 32, number=1).tolist()
    assert len(set(some)) == 32 and some == sorted(some) and some[0] >= 7168 and some[-1] < 8192


def test_the_grid_is_that_of_the_model():
    grid = selection.grid(TOP_K, 16)
    labels = [chosen.label for chosen in grid]
    assert "misa:h=8" in labels and "misa:h=16" not in labels
    assert len(set(labels)) == len(labels)
    assert all(chosen.top_k == TOP_K for chosen in grid)


def test_comparison(model, windows, tmp_path):
    made = indexer.load(tmp_path, indexer.Shape(2, 128, 16, 16))
    choices = [sparse.choice("dsa", TOP_K), *selection.grid(TOP_K, 16)]
    sample = Sample([windows[0], windows[1]], [0, 1])
    results = selection.measure(model, made, sample, choices, rows=16, layers=[0, 1])
    by_label = {one["label"]: one for one in results}
    assert by_label["dsa"]["recall"] == (1.0, 1.0, 1.0)
    assert by_label["dsa"]["attention"][0] == pytest.approx(1)
    assert by_label["dsa:fp8"]["recall"][0] > 0.9
    assert by_label["misa-r:h=3:m=4k"]["recall"][0] > 0.9
    assert by_label["random"]["recall"][0] < 0.5
    for one in results:
        mean = sum(layer["recall"][0] for layer in one["layers"]) / 2
        assert one["recall"][0] == pytest.approx(mean)
        assert one["recall"][0] == pytest.approx(sum(one["recall_by_window"]) / 2)
    assert len(selection.table(results).splitlines()) == len(results) + 1
