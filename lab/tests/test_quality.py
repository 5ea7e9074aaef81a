# SPDX-License-Identifier: Apache-2.0
"""The statistics by hand, and the measurement on a tiny random model."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from lab import indexer, quality  # noqa: E402
from lab.trained import Sample  # noqa: E402


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


def test_measurement(model, windows, tmp_path):
    made = indexer.load(tmp_path, indexer.Shape(2, 128, 4, 16))
    sample = Sample([windows[0], windows[1]], [0, 1])
    entries, means = quality.measure(model, made, sample, [8, 30], rows=20)
    assert [(e["layer"], e["top_k"]) for e in entries] == [(0, 8), (0, 30), (1, 8), (1, 30)]
    for entry in entries:
        assert entry["best"][0] > max(entry[name][0] for name in ("indexer", "recent", "random"))
        assert all(low <= mean <= high for mean, low, high in map(entry.get, quality.CHOICES))
        over = entry["indexer"][0] - entry["recent"][0]
        assert entry["over_recent"][0] == pytest.approx(over)
    for mean in means:
        of_layers = [entry["indexer"][0] for entry in entries if entry["top_k"] == mean["top_k"]]
        assert mean["indexer"][0] == pytest.approx(sum(of_layers) / 2)
    assert len(quality.table(entries).splitlines()) == 5
    # A k does not depend on the others that are asked for.
    alone, _ = quality.measure(model, made, sample, [8], rows=20)
    assert alone == [entry for entry in entries if entry["top_k"] == 8]
