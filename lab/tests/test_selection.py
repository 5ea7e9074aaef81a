# SPDX-License-Identifier: Apache-2.0
"""Shares by hand, and the comparison on a tiny random model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import misa  # noqa: E402
from lab import indexer, selection  # noqa: E402

TOP_K = 8


def test_shares_by_hand():
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.4, 0.4]])
    dsa = torch.tensor([[0, 1], [2, 3]])
    assert selection.shares(dsa, dsa, attention) == (1.0, 1.0)
    recall, kept = selection.shares(torch.tensor([[0, 3], [1, 0]]), dsa, attention)
    assert recall == 0.25
    assert kept == pytest.approx((0.5 / 0.7 + 0.2 / 0.8) / 2)


def test_rounding_keeps_values():
    x = torch.randn(5, 128) * torch.tensor([1e-3, 1.0, 30.0, 0.0, 5.0])[:, None]
    values, scale = selection.rounded(x)
    error = (values.float() * scale[:, None] - x).abs()
    assert (error <= x.abs() / 16 + scale[:, None] / 128).all()


def test_the_grid_is_that_of_the_model():
    labels = selection.grid(TOP_K, 16)
    assert "MISA 8" in labels and "MISA 16" not in labels
    for entry in labels.values():
        assert entry.config.top_k == TOP_K
        assert entry.fp8 or entry.config.sketch == 0


def test_comparison(model, windows, tmp_path):
    made = indexer.load(tmp_path, indexer.Shape(2, 128, 16, 16))
    entries = {"the same": selection.Entry(misa.Config("dsa", top_k=TOP_K))}
    entries |= selection.grid(TOP_K, 16)
    results = selection.measure(
        model, made, [windows[0], windows[1]], entries, TOP_K, rows=16, layers=[0, 1]
    )
    by_label = {one["label"]: one for one in results}
    assert by_label["the same"]["recall"] == (1.0, 1.0, 1.0)
    assert by_label["the same"]["attention"][0] == pytest.approx(1)
    assert by_label["DSA, e4m3"]["recall"][0] > 0.9
    assert by_label["MISA-R 3 + 1, m = 4 k"]["recall"][0] > 0.9
    assert by_label[selection.RANDOM]["recall"][0] < 0.5
    for one in results:
        mean = sum(one["recall_by_layer"].values()) / 2
        assert one["recall"][0] == pytest.approx(mean)
    assert len(selection.table(results).splitlines()) == len(results) + 1
