# SPDX-License-Identifier: Apache-2.0
"""The statistics by hand, and the measurement on a tiny random model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from lab import indexer, quality  # noqa: E402


def test_shares_by_hand():
    attention = torch.tensor([[0.5, 0.1, 0.3, 0.1, 0.0], [0.1, 0.1, 0.1, 0.2, 0.5]])
    found = torch.tensor([[9.0, 8.0, 1.0, 1.0, 99.0], [0.0, 5.0, 6.0, 1.0, 2.0]])
    rows = torch.tensor([3, 4])
    shares = quality.kept(attention, found, rows, 2, seed=0)
    assert shares["best"] == pytest.approx((0.8 + 0.7) / 2)
    assert shares["indexer"] == pytest.approx((0.6 + 0.2) / 2)
    assert shares["recent"] == pytest.approx((0.4 + 0.7) / 2)
    # Of all positions that a row sees, every choice keeps all.
    for share in quality.kept(attention[:1], found[:1], rows[:1], 4, seed=0).values():
        assert share == pytest.approx(1)


def test_random_positions_keep_their_share():
    attention = torch.full((2000, 40), 1 / 40)
    attention[:, :4] += 0.1
    attention /= attention.sum(1, keepdim=True)
    rows = torch.full((2000,), 39)
    share = quality.kept(attention, attention, rows, 10, seed=1)["random"]
    assert share == pytest.approx(0.25, abs=0.02)


def test_interval_by_hand():
    assert quality.interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = quality.interval([0.0, 1.0] * 50)
    assert mean == 0.5
    # Means of 100 draws of 0 or 1 have a deviation of 0.05.
    assert 0.5 - low == pytest.approx(0.098, abs=0.02)
    assert high - 0.5 == pytest.approx(0.098, abs=0.02)


def test_measurement(model, windows, tmp_path):
    made = indexer.load(tmp_path, indexer.Shape(2, 128, 4, 16))
    entries = quality.measure(model, made, [windows[0], windows[1]], [8, 30], rows=20)
    assert [(e["layer"], e["top_k"]) for e in entries] == [(0, 8), (0, 30), (1, 8), (1, 30)]
    for entry in entries:
        assert entry["best"][0] > max(entry[name][0] for name in ("indexer", "recent", "random"))
        assert all(low <= mean <= high for mean, low, high in map(entry.get, quality.CHOICES))
    assert len(quality.table(entries).splitlines()) == 5
